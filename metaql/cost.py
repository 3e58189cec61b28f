"""What a form of a block costs."""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from metaql.logical import OUTER, Block, Gather, Relation, Scalar
from metaql.stats import ONE, UNKNOWN, Count, Precision, Statistics

# A group that is gathered becomes a vector of its own: defined, kept, and laid out when it is first looked at.
GROUP = 8
# Pairs are joined before they are multiplied, and each is looked up on both sides.
PAIRS = 2
# A sub-query that reads the rows around it runs for each of them; how many there are is not known where it stands.
OUTER_ROWS = 1000


@dataclass(frozen=True)
class Cost:
    """Rows that are combined into vectors, vectors that come of it, and products of two vectors."""

    gathered: Count
    groups: Count
    products: Count
    sides: int

    @property
    def total(self) -> Count:
        """In products of two vectors."""
        many = Count(GROUP, ONE.precision) * self.groups
        pairs = Count(1 if self.sides else PAIRS, ONE.precision)
        return self.gathered + many + pairs * self.products

    @property
    def order(self) -> tuple[bool, float]:
        """What is known comes before what is not; of that, what gathers more comes first."""
        total = self.total.value
        if total is None:
            return True, float(-self.sides)
        return False, total


def cost(block: Block, statistics: Statistics) -> Cost:
    """The cost of a block."""
    zero = Count(0, ONE.precision)
    gathered, groups = zero, zero
    for gather in block.gathers():
        gathered = gathered + statistics.rows(gather.relations, gather.conjuncts)
        groups = groups + (statistics.gathered(gather) if gather.keys else zero)
    return Cost(gathered, groups, _products(block, statistics), sum(1 for _ in block.gathers()))


def joined(block: Block, statistics: Statistics) -> Count:
    """Rows of the block's join: those of its parts multiplied, divided by the values that an equality must meet."""
    rows = ONE
    for relation in block.relations:
        alone = tuple(one for one in block.conjuncts if one.reads == {relation.alias})
        # An empty relation is found out as late as one of a single row.
        rows = rows * statistics.rows((relation,), alone).at_least_one()
    for conjunct in block.conjuncts:
        if len(conjunct.reads) > 1 and isinstance(conjunct.sql, exp.EQ | exp.NullSafeEQ):
            rows = rows.over(_values(block, conjunct.sql, statistics))
    return rows


def expected(block: Block, statistics: Statistics) -> Count:
    """How many products each gathered vector is in."""
    if any(OUTER in one.reads for one in block.aggregates):
        return UNKNOWN
    rows = joined(block, statistics)
    for gather in block.gathers():
        rows = rows.over(statistics.gathered(gather)) if gather.keys else rows
    return rows


def _products(block: Block, statistics: Statistics) -> Count:
    scores = [one for one in block.aggregates if one.is_score or one.is_vector]
    if not scores:
        return Count(0, ONE.precision)
    rows = Count(len(scores), ONE.precision) * joined(block, statistics)
    if any(OUTER in one.reads for one in scores):
        rows = rows * Count(OUTER_ROWS, Precision.ESTIMATED)
    return rows


def _values(block: Block, equality: exp.Expr, statistics: Statistics) -> Count:
    """How many values the sides of an equality have: of the side with more of them."""
    columns = [one for one in (equality.args["this"], equality.args["expression"]) if isinstance(one, exp.Column)]
    found = [
        _distinct(relation, column, block, statistics)
        for column in columns
        for relation in block.relations
        if relation.alias.lower() == column.table.lower()
    ]
    known = [one for one in found if one.value is not None]
    return max(known, key=lambda one: one.value or 0) if known else ONE


def _distinct(relation: Relation | Gather, column: exp.Column, block: Block, statistics: Statistics) -> Count:
    if isinstance(relation, Gather):
        keys = tuple(key for name, key in relation.keys if name == column.name)
        return statistics.groups(relation.relations, relation.conjuncts, keys)
    alone = tuple(one for one in block.conjuncts if one.reads == {relation.alias})
    return statistics.groups((relation,), alone, (Scalar(column, frozenset([relation.alias])),))
