"""Small logical blocks from text, and numbers to plan them by: no store, and no DuckDB."""

from __future__ import annotations

import re

from sqlglot import exp, parse_one

from metaql.logical import COUNT, STEADY, Aggregate, Block, Gather, Precondition, Relation, Scalar, Term, Vector
from metaql.parse import to_sql
from metaql.stats import ONE, UNKNOWN, Count, Precision, Statistics


def scalar(text: str) -> Scalar:
    """An expression; a column that does not say whose it is belongs to the query outside."""
    sql = parse_one(text, dialect="duckdb")
    return Scalar(sql, frozenset(column.table for column in sql.find_all(exp.Column)))


def vector(text: str, *patterns: str, by: str | None = None) -> Vector:
    """A gradient, preconditioned by a method, and restricted to layers."""
    one = scalar(text)
    precondition = None if by is None else Precondition((parse_one(by),), symmetric=by != "'lissa'")
    return Vector(one.sql, one.reads, tuple(map(scalar, patterns)), precondition)


def term(*parts: str | Vector) -> Term:
    """A product of numbers, and of those of the parts that are gradients."""
    factors = tuple(scalar(part) for part in parts if isinstance(part, str))
    return Term(factors, tuple(part for part in parts if isinstance(part, Vector)))


def pair(left: str, right: str, *factors: str) -> Term:
    """Factors times the inner product of two relations' gradients."""
    return term(*factors, vector(f"{left}.gradient"), vector(f"{right}.gradient"))


def aggregate(function: str, *terms: Term) -> Aggregate:
    """avg, sum or count of a sum of terms."""
    return Aggregate(function, terms, parse_one(f"{function}(x)"))


def count(*parts: str) -> Aggregate:
    """count(*), or of an expression."""
    return Aggregate(COUNT, tuple(term(part) for part in parts), parse_one(f"count({parts[0] if parts else '*'})"))


def steady(text: str) -> Aggregate:
    """min, max and the like."""
    argument = scalar(text)
    # any_value ignores NULLs in any case, and is parsed so; what is bound is the function within.
    sql = argument.sql.this if isinstance(argument.sql, exp.IgnoreNulls) else argument.sql
    return Aggregate(STEADY, (), argument.sql, Scalar(sql, argument.reads))


def block(
    aliases: str,
    *aggregates: Aggregate,
    by: str | None = "",
    where: str = "",
    outputs: str = "",
    unique: str = "sample_id",
) -> Block:
    """Aggregates over relations, by keys (None for no group at all) and under conditions, with commas between."""
    keys = None if by is None else _scalars(by)
    relations = tuple(Relation(alias, exp.to_table(alias), frozenset(unique.split())) for alias in aliases.split())
    return Block(relations, _scalars(where), keys, aggregates, _scalars(outputs))


def _scalars(text: str) -> tuple[Scalar, ...]:
    return tuple(scalar(one) for one in text.split(", ") if one)


class Numbers(Statistics):
    """So many rows for each relation, so many values for each key; a condition leaves such a part. Else unknown."""

    def __init__(self, **relations: float) -> None:
        self._numbers = relations

    def where(self, **known: float) -> Numbers:
        """With more numbers: of t.label as t_label, of the condition t.label = v.label as t_label_v_label."""
        return Numbers(**self._numbers, **known)

    def rows(self, relations: tuple[Relation | Gather, ...], conjuncts: tuple[Scalar, ...]) -> Count:
        found = ONE
        for relation in relations:
            found = found * (self.gathered(relation) if isinstance(relation, Gather) else self._of(relation.alias))
        for conjunct in conjuncts:
            found = found * self._of(_name(conjunct), Precision.ESTIMATED)
        return found

    def groups(
        self, relations: tuple[Relation | Gather, ...], conjuncts: tuple[Scalar, ...], keys: tuple[Scalar, ...]
    ) -> Count:
        found = ONE
        for key in keys:
            found = found * self._of(_name(key), Precision.ESTIMATED)
        return found

    def _of(self, name: str, precision: Precision = Precision.EXACT) -> Count:
        value = self._numbers.get(name)
        return UNKNOWN if value is None else Count(value, precision)


def _name(one: Scalar) -> str:
    return "_".join(re.findall(r"\w+", to_sql(one.sql)))
