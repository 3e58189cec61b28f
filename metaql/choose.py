"""What to gather: of all equal forms of a block, the one that costs least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from sqlglot import exp

from metaql.cost import Cost, cost
from metaql.logical import EACH, EACH_COUNT, OUTER, Block, Gather, Relation
from metaql.optimizer import optimize, require_same_schema
from metaql.rules.gather_side import gather_side
from metaql.scope import Unsure
from metaql.sides import Side, sides
from metaql.stats import Precision, Statistics

# How much more a form has to promise than its side's rows alone cost to be looked into.
DEARER = 1.25
# From this share of rows on, groups are no fewer: counts of groups are sketches.
ALIKE = 0.8


@dataclass(frozen=True)
class Alternative:
    """One form of a block: what is gathered in it, the rules that made it, and its cost."""

    gathered: tuple[Side, ...]
    block: Block
    rules: tuple[tuple[str, Block], ...]
    cost: Cost


@dataclass(frozen=True)
class Choice:
    """The cheapest form first, then the others by cost; and why some sides can't be gathered."""

    alternatives: tuple[Alternative, ...]
    reasons: tuple[str, ...]

    @property
    def best(self) -> Alternative:
        """The one that is run."""
        return self.alternatives[0]


def choose(block: Block, statistics: Statistics) -> Choice:
    """All forms with their costs. Of equal ones the first stays first: fewer sides gathered, the query side before."""
    reasons: list[str] = []
    found = _alternatives(block, statistics, reasons)
    found = [one for one in found if _is_our_own(one.block)]
    found.append(_finished((), (("", block),), statistics))
    # The sort is stable. What nothing is known of is kept as far from pairs as possible.
    found.sort(key=lambda one: one.cost.order)
    return Choice(tuple(found), tuple(dict.fromkeys(reasons)))


Step = tuple[str, Block]


def _alternatives(block: Block, statistics: Statistics, reasons: list[str]) -> list[Alternative]:
    single = [(side, form) for side in sides(block) if (form := _gathered(block, side, statistics, reasons))]
    vectors = [one for one in single if not any(gather.keys for gather in one[1].gathers())]
    found: list[Alternative] = []
    # A side that becomes a single vector is gathered; no form does less than a product for each row of the other.
    for side, form in vectors or single:
        if _gathers_nothing(form, statistics):
            reasons.append(f"{', '.join(sorted(side))} has about as many groups as rows")
        elif not _is_dearer(side, block, found, statistics):
            found.append(_finished((side,), (("gather_side", form),), statistics))
    for chain in _chains(vectors) if vectors else combinations(single, 2):
        steps = _gathered_all(chain, statistics, reasons)
        if steps is None or _gathers_nothing(steps[-1][1], statistics):
            continue
        if not _is_dearer(chain[-1][0], block, found, statistics):
            found.append(_finished(tuple(side for side, _ in chain), steps, statistics))
    return found


def _chains(vectors: list[tuple[Side, Block]]) -> Iterator[tuple[tuple[Side, Block], ...]]:
    """The first two, the first three, and so on."""
    yield from (tuple(vectors[:count]) for count in range(2, len(vectors) + 1))


def _gathered_all(
    chain: tuple[tuple[Side, Block], ...], statistics: Statistics, reasons: list[str]
) -> tuple[Step, ...] | None:
    """One side after the other; None where a side can't be gathered beside the others, or need not."""
    (side, form), *others = chain
    steps = [("gather_side", form)]
    for other, _ in others:
        following = None if side & other or _meets_one(form) else _gathered(form, other, statistics, reasons)
        if following is None:
            return None
        side, form = side | other, following
        steps.append(("gather_side", form))
    return tuple(steps)


def _gathers_nothing(form: Block, statistics: Statistics) -> bool:
    """Whether a gathered side has about as many groups as rows."""
    for gather in form.gathers():
        rows, groups = statistics.rows(gather.relations, gather.conjuncts).value, statistics.gathered(gather).value
        if gather.keys and rows and groups is not None and groups > ALIKE * rows:
            return True
    return False


def _is_dearer(side: Side, block: Block, found: list[Alternative], statistics: Statistics) -> bool:
    """Whether the side's rows alone take about what a form takes that is known, so that no group need be counted."""
    known = [one.cost.total.value for one in found if one.cost.total.value is not None]
    relations = [relation for relation in block.relations if relation.alias in side]
    alone = [tuple(one for one in block.conjuncts if one.reads == {relation.alias}) for relation in relations]
    rows = [statistics.rows((one,), conditions).value for one, conditions in zip(relations, alone, strict=True)]
    return bool(known) and max((count or 0 for count in rows), default=0) * DEARER > min(known)


def _meets_one(block: Block) -> bool:
    """Whether each row meets at most one group of the gathered side: to gather the rows as well gains nothing."""
    keyed = [gather for gather in block.gathers() if gather.keys]
    return bool(keyed) and all(
        any(isinstance(one.sql, exp.EQ) and _is_column(one.sql, gather, name) for one in block.conjuncts)
        for gather in keyed
        for name, _ in gather.keys
    )


def _is_column(equality: exp.Expr, gather: Gather, name: str) -> bool:
    sides = (equality.args["this"], equality.args["expression"])
    return any(isinstance(one, exp.Column) and one.table == gather.alias and one.name == name for one in sides)


def _gathered(block: Block, side: Side, statistics: Statistics, reasons: list[str]) -> Block | None:
    try:
        form = gather_side(block, side)
    except Unsure as reason:
        reasons.append(str(reason))
        return None
    require_same_schema(block, form, gather_side.__name__)
    return _unguarded(form, statistics)


def _is_our_own(block: Block) -> bool:
    """Whether every aggregate reads a row of this query: one of outer columns alone would be the outer query's."""
    return all(
        one.function in (EACH, EACH_COUNT) or OUTER not in one.reads or bool(one.reads & block.local)
        for one in block.aggregates
    )


def _unguarded(block: Block, statistics: Statistics) -> Block:
    """A side that surely has rows needs no guard."""

    def known(relation: Relation | Gather) -> Relation | Gather:
        if not isinstance(relation, Gather) or not relation.guarded:
            return relation
        rows = statistics.rows(relation.relations, relation.conjuncts)
        return replace(relation, guarded=not (rows.precision == Precision.EXACT and rows.value))

    return replace(block, relations=tuple(known(one) for one in block.relations))


def _finished(gathered: tuple[Side, ...], steps: tuple[Step, ...], statistics: Statistics) -> Alternative:
    form, applied = optimize(steps[-1][1]) if gathered else (steps[-1][1], ())
    rules = (*steps, *((name, form) for name in applied)) if gathered else ()
    return Alternative(gathered, form, rules, cost(form, statistics))
