"""A logical block as a line of text."""

from __future__ import annotations

from metaql.logical import (
    COUNT,
    EACH,
    EACH_COUNT,
    STEADY,
    Aggregate,
    Block,
    Column,
    Gather,
    Precondition,
    Relation,
    Scalar,
    Term,
    Vector,
)
from metaql.parse import to_sql


def block_text(block: Block) -> str:
    """Aggregates over relations under conditions by keys."""
    aggregates = ", ".join(map(_aggregate, block.aggregates)) or "rows"
    over = " × ".join(map(_relation, block.relations)) or "one row"
    keys = "" if not block.keys else f" by {_list(block.keys)}"
    return f"{aggregates} over {over}{_where(block.conjuncts)}{keys}"


def _aggregate(aggregate: Aggregate) -> str:
    if aggregate.argument is not None:
        return to_sql(aggregate.argument.sql)
    terms = " + ".join(map(_term, aggregate.terms)) or "*"
    text = terms if aggregate.function in (EACH, EACH_COUNT) else f"{aggregate.function}({terms})"
    weights = "".join(f" weighted {to_sql(one.sql)}" for one in aggregate.weights)
    scales = "".join(f" · {to_sql(one.sql)}" for one in aggregate.scales)
    return text + weights + scales


def _term(term: Term) -> str:
    factors = [f"({to_sql(one.sql)})" for one in term.factors]
    vectors = ", ".join(map(_vector, term.vectors))
    return "·".join([*factors, *([f"⟨{vectors}⟩" if len(term.vectors) == 2 else vectors] if vectors else [])])


def _vector(vector: Vector) -> str:
    return _applied(to_sql(vector.sql), vector.precondition, vector.patterns)


def _applied(text: str, precondition: Precondition | None, patterns: tuple[Scalar, ...]) -> str:
    if precondition is not None:
        text = f"precondition({', '.join([text, *map(to_sql, precondition.arguments)])})"
    return text + "".join(f"|{to_sql(one.sql)}" for one in patterns)


def _relation(relation: Relation | Gather) -> str:
    if isinstance(relation, Relation):
        return relation.alias
    columns = ", ".join(map(_column, relation.columns))
    over = " × ".join(map(_relation, relation.relations))
    keys = f" by {_list(tuple(key for _, key in relation.keys))}" if relation.keys else ""
    return f"{relation.alias}[{columns} over {over}{_where(relation.conjuncts)}{keys}]"


def _column(column: Column) -> str:
    if column.function == STEADY and column.argument is not None:
        return f"{column.name} = {to_sql(column.argument.sql)}"
    if column.function == COUNT:
        return f"{column.name} = count"
    summed = f"{column.function}({' + '.join(map(_term, column.terms)) or '*'})"
    return f"{column.name} = {_applied(summed, column.precondition, column.patterns)}"


def _where(conjuncts: tuple[Scalar, ...]) -> str:
    return f" where {' and '.join(to_sql(one.sql) for one in conjuncts)}" if conjuncts else ""


def _list(scalars: tuple[Scalar, ...]) -> str:
    return ", ".join(to_sql(one.sql) for one in scalars)
