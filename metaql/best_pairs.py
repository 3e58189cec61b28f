"""Which of all pairs a query wants, where it wants the best only."""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from metaql.pair_shape import Shape
from metaql.scope import name_of


@dataclass(frozen=True)
class Best:
    """So many best pairs are asked for, of each ``side``; the smallest where the count is below 0."""

    count: int
    side: str


def best_of(shape: Shape) -> Best | None:
    """The k best pairs that the SELECT wants, of all or of each row or member; None where it looks at others too.

    The best of a group of rows or members are among the best of its parts. What is asked of pairs besides, or
    counted over them, needs them all.
    """
    select = shape.scope.select
    if len(shape.products) != 1 or shape.conditions or select.args.get("distinct") or select.args.get("group"):
        return None
    windows = {window.sql("duckdb"): window for window in select.find_all(exp.Window)}
    if select.find(exp.AggFunc) or len(windows) > 1:
        return None
    if not windows:
        return _top(shape) if not select.args.get("qualify") else None
    ((_, window),) = windows.items()
    return _top_of_each(shape, window)


def _top(shape: Shape) -> Best | None:
    order, limit = shape.scope.select.args.get("order"), shape.scope.select.args.get("limit")
    offset = shape.scope.select.args.get("offset")
    if limit is None or order is None or any(value for key, value in limit.args.items() if key != "expression"):
        return None
    count = _number(limit.expression)
    skipped = _number(offset.expression) if offset else 0
    if not count or skipped is None:
        return None
    return _ordered(shape, order, count + skipped, "all")


def _top_of_each(shape: Shape, window: exp.Window) -> Best | None:
    qualify, order = shape.scope.select.args.get("qualify"), window.args.get("order")
    if (
        qualify is None
        or order is None
        or window.args.get("spec")
        or name_of(window.this) not in ("row_number", "rank")
    ):
        return None
    condition = qualify.this
    found = [
        _bound(one, window, shape) for one in (condition.flatten() if isinstance(condition, exp.And) else [condition])
    ]
    counts = [count for count in found if count]
    reads = frozenset[str]().union(*(shape.scope.reads(one) for one in window.args.get("partition_by") or ()))
    sides = {"member": shape.members.aliases, "row": shape.rows.aliases}
    side = "all" if not reads else next((name for name, aliases in sides.items() if reads <= aliases), None)
    if not counts or side is None:
        return None
    return _ordered(shape, order, min(counts), side)


def _bound(condition: exp.Expr, window: exp.Window, shape: Shape) -> int | None:
    """k, where the condition is that the window's number is at most k."""
    if not isinstance(condition, exp.LTE | exp.LT | exp.EQ):
        return None
    number = condition.left
    if isinstance(number, exp.Column) and shape.scope.is_alias(number):
        number = shape.scope.aliases[number.name.lower()]
    count = _number(condition.right)
    if number.sql("duckdb") != window.sql("duckdb") or count is None:
        return None
    return count - 1 if isinstance(condition, exp.LT) else count


def _ordered(shape: Shape, order: exp.Order, count: int, side: str) -> Best | None:
    """Only where the score itself comes first, and NULLs last, as they do by default."""
    first = order.expressions[0]
    score = first.this
    if isinstance(score, exp.Column) and len(score.parts) == 1:
        score = shape.scope.aliases.get(score.name.lower())
    if score is not shape.products[0][0] and score != shape.products[0][0]:
        return None
    if first.args.get("nulls_first") or count < 1:
        return None
    return Best(count if first.args.get("desc") else -count, side)


def _number(node: exp.Expr | None) -> int | None:
    return int(node.name) if isinstance(node, exp.Literal) and node.name.isdigit() else None
