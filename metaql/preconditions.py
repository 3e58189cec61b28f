"""Puts a preconditioner where it is computed once: ⟨P t, v⟩ is ⟨t, P v⟩, and P of a sub-query's row is a row of P's."""

from __future__ import annotations

from sqlglot import exp

from metaql.algebra import bare, precondition_of
from metaql.bind import conjuncts_of
from metaql.catalogue import Catalogue, alias_of
from metaql.compile import keep_name
from metaql.logical import Precondition, Relation, Scalar
from metaql.rules.gather_side import applied
from metaql.scope import Scope, Unsure, name_of
from metaql.stats import Statistics


def precondition_fewer(select: exp.Select, catalogue: Catalogue, statistics: Statistics) -> bool:
    """Preconditions the side of a product that has fewer rows, before a sub-query's row leaves it; whether it did.

    For what no rule has gathered: products pair by pair, and with sub-queries.
    """
    found = [
        node
        for node in select.find_all(exp.Anonymous)
        if name_of(node) == "inner_product" and node.find_ancestor(exp.Query) is select and len(node.expressions) == 2
    ]
    found = [node for node in found if any(precondition_of(bare(one)) for one in node.expressions)]
    if not found:
        return False
    moved = [_move(node, select, catalogue, statistics) for node in found]
    entered = [_enter(one, select) for node in found for one in list(node.expressions)]
    return any(moved) or any(entered)


def _move(node: exp.Anonymous, select: exp.Select, catalogue: Catalogue, statistics: Statistics) -> bool:
    """⟨P t, v⟩ => ⟨t, P v⟩ where v has fewer rows than t."""
    preconditions = [precondition_of(bare(one)) for one in node.expressions]
    (place, own), *others = [(place, one) for place, one in enumerate(preconditions) if one is not None]
    if others or not own.symmetric:
        return False
    mine, theirs = node.expressions[place], node.expressions[1 - place]
    if not _fewer(theirs, mine, select, catalogue, statistics):
        return False
    keep_name(select, node)
    pair = [bare(mine).expressions[0].copy(), applied(theirs.copy(), own, ())]
    node.set("expressions", pair if place == 0 else pair[::-1])
    return True


def _fewer(one: exp.Expr, other: exp.Expr, select: exp.Select, catalogue: Catalogue, statistics: Statistics) -> bool:
    """Whether an expression has fewer values than another; not where that is unknown."""
    try:
        scope = Scope(select, catalogue)
        counts = [_values(each, scope, catalogue, statistics) for each in (one, other)]
    except Unsure:
        return False
    return None not in counts and counts[0] < counts[1]  # type: ignore[operator]


def _values(node: exp.Expr, scope: Scope, catalogue: Catalogue, statistics: Statistics) -> float | None:
    reads = scope.reads(node)
    relations = tuple(
        Relation(alias_of(item, n), item, catalogue.unique_columns(item, scope.select))
        for n, item in enumerate(scope.items)
        if alias_of(item, n) in reads
    )
    conjuncts = (Scalar(scope.qualified(one), scope.reads(one)) for one in conjuncts_of(scope.select))
    own = tuple(one for one in conjuncts if one.reads and one.reads <= reads)
    return statistics.rows(relations, own).value if relations else 1.0


def _enter(node: exp.Expr, select: exp.Select) -> bool:
    """P (SELECT g FROM …) => (SELECT P g FROM …), which the planner takes for what it is: one vector for all rows."""
    own, call = precondition_of(bare(node)), bare(node)
    inner = bare(call.expressions[0]) if own is not None else None
    if own is None or not isinstance(inner, exp.Subquery) or not isinstance(inner.this, exp.Select):
        return False
    query = inner.this
    if query.args.get("distinct") or len(query.expressions) != 1 or query.expressions[0].is_star:
        return False
    keep_name(select, node)
    entered = inner.copy()
    entered.this.set("expressions", [_around(query.expressions[0], own)])
    node.replace(entered)
    return True


def _around(item: exp.Expr, own: Precondition) -> exp.Expr:
    changed = applied(item.unalias().copy(), own, ())
    return exp.alias_(changed, item.alias, quoted=True) if isinstance(item, exp.Alias) else changed
