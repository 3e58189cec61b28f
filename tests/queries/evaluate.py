"""What a query of ``model`` means: nested loops over rows, float64 vectors, SQL's three truth values."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.queries.model import (
    Aggregate,
    Call,
    Case,
    Column,
    Constant,
    Exists,
    Expr,
    In,
    IsNull,
    Negative,
    Op,
    Scalar,
    Select,
    Source,
    Window,
)
from tests.queries.stores import PlainStore

# Source name -> its row; None is the row that an outer join makes up.
Env = dict[str, Any]

OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "%": operator.mod,
    "=": operator.eq,
    "<>": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


class Evaluator:
    """Queries over one store. ``magnitude`` is the largest sum of absolute values met, which bounds rounding."""

    def __init__(self, store: PlainStore) -> None:
        self._store = store
        self.magnitude = 1.0

    def rows(self, select: Select, outer: Env | None = None) -> list[tuple[Any, ...]]:
        """The result's rows, in the order asked for."""
        return [tuple(row.values()) for row in self.named_rows(select, outer or {})]

    def named_rows(self, select: Select, outer: Env) -> list[dict[str, Any]]:
        groups = self._groups(select, outer)
        if select.having is not None:
            groups = [group for group in groups if self._value(select.having, group) is True]
        if select.qualify is not None:
            kept = self._values(select.qualify, groups)
            groups = [group for group, keep in zip(groups, kept, strict=True) if keep is True]
        columns = [self._values(expression, groups) for _, expression in select.columns]
        names = [name for name, _ in select.columns]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        return _cut(select, _distinct(rows) if select.distinct else rows)

    def _groups(self, select: Select, outer: Env) -> list[list[Env]]:
        """Lists of joined rows: one row each without aggregation."""
        joined = [env for env in self._joined(select.sources, outer) if self._holds(select.where, env)]
        if select.keys is None:
            return [[env] for env in joined]
        if not select.keys:
            return [joined or [_Empty(outer)]]
        groups: dict[Any, list[Env]] = {}
        for env in joined:
            groups.setdefault(tuple(self._value(key, [env]) for key in select.keys), []).append(env)
        return list(groups.values())

    def _joined(self, sources: tuple[Source, ...], outer: Env) -> list[Env]:
        found = [dict(outer)]
        for place, source in enumerate(sources):
            found = self._join(found, source, [one.name for one in sources[:place]])
        return found

    def _join(self, found: list[Env], source: Source, before: list[str]) -> list[Env]:
        fixed = None if source.lateral else self._source(source, {})
        result, used = [], set()
        for env in found:
            rows = self._source(source, env) if fixed is None else fixed
            count = len(result)
            for place, row in enumerate(rows):
                candidate = {**env, source.name: row}
                if self._holds(source.on, candidate):
                    result.append(candidate)
                    used.add(place)
            if len(result) == count and source.join in ("left", "full"):
                result.append({**env, source.name: None})
        if source.join in ("right", "full"):
            nothing = dict.fromkeys(before)
            result += [{**nothing, source.name: row} for place, row in enumerate(fixed or []) if place not in used]
        return result

    def _source(self, source: Source, outer: Env) -> list[Any]:
        if isinstance(source.of, Select):
            rows: list[Any] = self.named_rows(source.of, outer)
        else:
            rows = self._store.relations[source.of]
        return [row for row in rows if self._holds(source.where, {source.name: row})]

    def _holds(self, condition: Expr | None, env: Env) -> bool:
        return condition is None or self._value(condition, [env]) is True

    def _values(self, expression: Expr, groups: list[list[Env]]) -> list[Any]:
        """For each group; windows look at all of them."""
        windows = [one for one in expression.walk() if isinstance(one, Window)]
        known = [{window: values[k] for window, values in self._windows(windows, groups)} for k in range(len(groups))]
        return [self._value(expression, group, row) for group, row in zip(groups, known, strict=True)]

    def _windows(self, windows: list[Window], groups: list[list[Env]]) -> list[tuple[Window, list[Any]]]:
        return [(window, list(self._window(window, groups))) for window in windows]

    def _window(self, window: Window, groups: list[list[Env]]) -> Iterator[Any]:
        def of(expression: Expr | None, group: list[Env]) -> Any:
            return None if expression is None else self._value(expression, group)

        parts = [tuple(self._value(one, group) for one in window.partition) for group in groups]
        orders, values = [of(window.order, group) for group in groups], [of(window.argument, group) for group in groups]
        for mine, order in zip(parts, orders, strict=True):
            peers = [k for k, part in enumerate(parts) if part == mine]
            if window.name == "rank":
                yield 1 + sum(_before(orders[k], order) for k in peers)
            else:
                yield self._total(window.name, [values[k] for k in peers] if window.argument else [1] * len(peers))

    def _value(self, expression: Expr, group: list[Env], windows: dict[Window, Any] | None = None) -> Any:
        def of(one: Expr) -> Any:
            return self._value(one, group, windows)

        env = group[0]
        match expression:
            case Constant(value):
                return value
            case Column(source, name):
                return None if env[source] is None else env[source][name]
            case Op(op, left, right):
                return _combine(op, of(left), of(right))
            case Negative(value):
                return None if (found := of(value)) is None else -found
            case IsNull(value, negated):
                return (of(value) is None) != negated
            case Case(condition, value, otherwise):
                return of(value) if of(condition) is True else None if otherwise is None else of(otherwise)
            case Call(name, arguments):
                return self._call(name, [of(one) for one in arguments])
            case Aggregate():
                return self._aggregate(expression, [] if isinstance(env, _Empty) else group)
            case Window():
                return (windows or {})[expression]
            case Scalar(select):
                rows = self.rows(select, env)
                assert len(rows) <= 1
                return rows[0][0] if rows else None
            case Exists(select):
                return bool(self.rows(select, env))
            case In(value, select):
                return _is_in(of(value), [row[0] for row in self.rows(select, env)])
        raise TypeError(expression)

    def _aggregate(self, aggregate: Aggregate, group: list[Env]) -> Any:
        rows = [[env] for env in group if self._holds(aggregate.where, env)]
        if aggregate.argument is None:
            return len(rows)
        values = [self._value(aggregate.argument, row) for row in rows]
        if aggregate.distinct:
            values = list(dict.fromkeys(values))
        return self._total(aggregate.name, values)

    def _total(self, name: str, values: list[Any]) -> Any:
        values = [value for value in values if value is not None]
        if name == "count":
            return len(values)
        if not values:
            return None
        if name in ("min", "max", "any_value"):
            return max(values) if name == "max" else min(values)
        if name in ("sum", "avg") and not isinstance(values[0], np.ndarray):
            self.magnitude = max(self.magnitude, float(sum(abs(value) for value in values)))
        total = sum(values[1:], values[0])
        return total if name == "sum" else total / len(values)

    def _call(self, name: str, arguments: list[Any]) -> Any:
        if name == "coalesce":
            return next((one for one in arguments if one is not None), None)
        if name == "nullif":
            return None if arguments[0] == arguments[1] else arguments[0]
        if any(one is None for one in arguments):
            return None
        return getattr(self, f"_{name}")(*arguments)

    def _abs(self, value: float) -> float:
        return abs(value)

    def _layers(self, vector: np.ndarray, pattern: str) -> np.ndarray:
        return vector * self._store.mask(pattern)

    def _norm(self, vector: np.ndarray) -> float:
        return math.sqrt(float(vector @ vector))

    def _inner_product(self, left: np.ndarray, right: np.ndarray) -> float:
        self.magnitude = max(self.magnitude, self._norm(left) * self._norm(right))
        return float(left @ right)

    def _cosine_similarity(self, left: np.ndarray, right: np.ndarray) -> float | None:
        lengths = self._norm(left) * self._norm(right)
        return float(left @ right) / lengths if lengths else None


class _Empty(dict[str, Any]):
    """The row of a group without rows."""


def _combine(op: str, left: Any, right: Any) -> Any:
    if op == "AND":
        return False if left is False or right is False else None if left is None or right is None else True
    if op == "OR":
        return True if left is True or right is True else None if left is None or right is None else False
    if op == "IS NOT DISTINCT FROM":
        return left == right
    return None if left is None or right is None else OPERATIONS[op](left, right)


def _is_in(value: Any, values: list[Any]) -> bool | None:
    if not values:
        return False
    if value is not None and value in values:
        return True
    return None if value is None or None in values else False


def _before(one: Any, other: Any) -> bool:
    """In ascending order, NULL last."""
    return one is not None and (other is None or one < other)


def _distinct(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({tuple(row.values()): row for row in rows}.values())


def _cut(select: Select, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """ORDER BY, NULL last in both directions; OFFSET and LIMIT."""
    for name, descending in reversed(select.order):
        there = sorted((row for row in rows if row[name] is not None), key=lambda row: row[name], reverse=descending)
        rows = [*there, *(row for row in rows if row[name] is None)]
    end = None if select.limit is None else select.offset + select.limit
    return list(itertools.islice(rows, select.offset, end))
