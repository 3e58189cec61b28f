"""How many rows and groups there are, and how sure that is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from math import prod
from typing import Any

import duckdb
from sqlglot import exp

from metaql.catalogue import Catalogue, visible_ctes
from metaql.logical import Gather, Relation, Scalar
from metaql.parse import to_sql


class Precision(IntEnum):
    """EXACT was counted in what can't change; ESTIMATED is DuckDB's guess, or follows from one; UNKNOWN is nothing."""

    EXACT = 0
    ESTIMATED = 1
    UNKNOWN = 2


@dataclass(frozen=True)
class Count:
    """A number of rows with its precision; an unknown one has no number, and nothing computed from it has."""

    value: float | None
    precision: Precision

    def __mul__(self, other: Count) -> Count:
        if self.value is None or other.value is None:
            return UNKNOWN
        return Count(self.value * other.value, max(self.precision, other.precision))

    def __add__(self, other: Count) -> Count:
        if self.value is None or other.value is None:
            return UNKNOWN
        return Count(self.value + other.value, max(self.precision, other.precision))

    def at_least_one(self) -> Count:
        """The number, or 1 where it is smaller."""
        return self if self.value is None else Count(max(self.value, 1), self.precision)

    def over(self, other: Count) -> Count:
        """A quotient, of which it is never sure that it comes out even."""
        if self.value is None or other.value is None:
            return UNKNOWN
        return Count(self.value / max(other.value, 1), Precision.ESTIMATED)

    def __str__(self) -> str:
        if self.value is None:
            return "unknown"
        return f"{'' if self.precision == Precision.EXACT else '~'}{self.value:,.0f}"


UNKNOWN = Count(None, Precision.UNKNOWN)
ONE = Count(1, Precision.EXACT)

Answer = Callable[[str], list[tuple[Any, ...]]]


class Statistics:
    """Counts for one SELECT.

    ``exact`` says whether a relation's rows can't change while the connection is open; such are counted. Of others
    DuckDB's own estimate is taken. ``answer`` runs a query; ``counted`` keeps what was counted for other SELECTs.
    """

    def __init__(
        self, answer: Answer, exact: Callable[[exp.Expr], bool], with_: str, counted: dict[str, float] | None = None
    ) -> None:
        self._answer, self._exact, self._with = answer, exact, with_
        self._counted_before = {} if counted is None else counted
        self._known: dict[str, Count] = {}
        # Texts take longer to write than to look up. What has an id is kept, so that no other can have it.
        self._asked: dict[tuple[int, ...], tuple[Count, object]] = {}

    def rows(self, relations: tuple[Relation | Gather, ...], conjuncts: tuple[Scalar, ...]) -> Count:
        """Rows of relations joined under these conditions."""
        return self._count(relations, conjuncts, ())

    def groups(
        self, relations: tuple[Relation | Gather, ...], conjuncts: tuple[Scalar, ...], keys: tuple[Scalar, ...]
    ) -> Count:
        """Distinct values of the keys in such rows."""
        if not keys:
            return ONE
        if any(_is_key(relation, keys) for relation in relations) and len(relations) == 1:
            return self.rows(relations, conjuncts)
        found = self._count(relations, conjuncts, keys)
        if all(isinstance(one, Relation) and self._exact(one.item) for one in relations):
            return found
        # DuckDB guesses that a join has a group for each of its rows, where there are no more than the keys' own rows.
        read = frozenset().union(*(key.reads for key in keys))
        own = tuple(one for one in relations if one.alias in read)
        if not read or len(own) != len(read) or len(own) == len(relations):
            return found
        most = self.groups(own, tuple(one for one in conjuncts if one.reads <= read), keys)
        known = [one for one in (found, most) if one.value is not None]
        return min(known, key=lambda one: one.value or 0) if known else UNKNOWN

    def gathered(self, gather: Gather) -> Count:
        """Rows that a gathered side has."""
        return self.groups(gather.relations, gather.conjuncts, tuple(key for _, key in gather.keys))

    def estimate(self, query: str) -> Count:
        """DuckDB's own estimate of a query's rows."""
        return self._ask(f"EXPLAIN (FORMAT JSON) {query}", exact=False)

    def _count(
        self, relations: tuple[Relation | Gather, ...], conjuncts: tuple[Scalar, ...], keys: tuple[Scalar, ...]
    ) -> Count:
        parts = (relations, conjuncts, keys)
        identity = (*(id(one) for part in parts for one in part), len(relations), len(keys))
        if identity not in self._asked:
            self._asked[identity] = self._counted(relations, conjuncts, keys), parts
        return self._asked[identity][0]

    def _counted(
        self, relations: tuple[Relation | Gather, ...], conjuncts: tuple[Scalar, ...], keys: tuple[Scalar, ...]
    ) -> Count:
        base = [relation for relation in relations if isinstance(relation, Relation)]
        others = [relation for relation in relations if isinstance(relation, Gather)]
        if others:
            alone = tuple(one for one in conjuncts if not any(gather.alias in one.reads for gather in others))
            counts = [self._count(tuple(base), alone, keys), *map(self.gathered, others)]
            return prod(counts, start=ONE)
        if not base:
            return ONE
        exact = all(self._exact(relation.item) for relation in base)
        closed = [one for one in conjuncts if not one.sql.find(exp.Placeholder, exp.Query) and "" not in one.reads]
        exact = exact and len(closed) == len(conjuncts)
        text = _query(base, closed, keys, exact, self._with)
        if text not in self._known:
            self._known[text] = self._ask(text, exact)
        return self._known[text]

    def _ask(self, text: str, exact: bool) -> Count:
        try:
            if exact:
                if text not in self._counted_before:
                    self._counted_before[text] = float(self._answer(text)[0][0])
                sketched = "approx_count_distinct" in text
                return Count(self._counted_before[text], Precision.ESTIMATED if sketched else Precision.EXACT)
            return _estimate(self._answer(text))
        except duckdb.Error:
            return UNKNOWN


def statistics_of(select: exp.Select, catalogue: Catalogue) -> Statistics:
    """Counts for a SELECT that stands where it does: exact for the store's own relations."""

    def exact(item: exp.Expr) -> bool:
        return catalogue.stored(item, select) is not None

    return Statistics(catalogue.database.answer, exact, visible_ctes(select), catalogue.names.counts)


def _query(base: list[Relation], conjuncts: list[Scalar], keys: tuple[Scalar, ...], exact: bool, with_: str) -> str:
    items = ", ".join(to_sql(relation.item) for relation in base)
    where = " AND ".join(f"({to_sql(one.sql)})" for one in conjuncts)
    chosen = ", ".join(to_sql(key.sql) for key in keys)
    rows = f"FROM {items}{' WHERE ' + where if where else ''}"
    if not exact:
        return f"EXPLAIN (FORMAT JSON) {with_}SELECT {f'DISTINCT {chosen}' if keys else '1'} {rows}"
    # A sketch of the values: to count them one by one takes DuckDB several times as long.
    return f"{with_}SELECT {f'approx_count_distinct(hash({chosen}))' if keys else 'count(*)'} {rows}"


def _is_key(relation: Relation | Gather, keys: tuple[Scalar, ...]) -> bool:
    """Whether the keys tell every row of a relation apart."""
    names = {key.sql.name.lower() for key in keys if isinstance(key.sql, exp.Column)}
    return isinstance(relation, Relation) and bool(relation.unique) and relation.unique <= names


def _estimate(plan: list[tuple[Any, ...]]) -> Count:
    """The cardinality that DuckDB puts at the top of its plan."""
    nodes = json.loads(plan[0][1])
    node = nodes[0] if isinstance(nodes, list) else nodes
    while node:
        text = node.get("extra_info", {}).get("Estimated Cardinality")
        if text is not None:
            return Count(float(text), Precision.ESTIMATED)
        children = node.get("children") or []
        node = children[0] if children else None
    return UNKNOWN
