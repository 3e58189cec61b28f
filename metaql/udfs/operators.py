"""What the short forms (``p2p``, ``p2b``, …, ``hydra``) share: from a call's arguments to the SQL it stands for.

DuckDB has no table functions in Python. ``query(text)`` runs a text that it evaluates when a query is bound, so a
scalar function that returns SQL acts as one, and the macro in front of it (``relations.py``) gives its arguments
names and defaults.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import duckdb
import pyarrow as pa

from metaql.errors import QueryError, UnknownNameError
from metaql.storage.arrow_arrays import column
from metaql.udfs import references
from metaql.udfs.function import Function
from metaql.udfs.quoting import literal, quoted
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource

_PART = r'(?:\w+|"(?:[^"]|"")+")'
_BEGINS_A_QUERY = re.compile(r"[\s(]*(select|with|from|values|table)\b", re.IGNORECASE)
_NAME = re.compile(rf"\s*{_PART}(?:\.{_PART})*\s*")


@dataclass(frozen=True)
class Call:
    """The arguments of a short form, in their order; SQL may give NULL for any."""

    train: str | None = "train"
    query: str | None = "validation"
    layers: str | None = "*"
    checkpoint: int | None = None


@dataclass(frozen=True)
class Asked:
    """A call of the short form ``name``, and where it stands.

    ``relations`` are the names that mean relations of the store's schema whatever else there is of that name; all
    others mean what they mean where the call stands.
    """

    name: str
    call: Call
    source: StoreSource
    relations: tuple[str, ...]

    def where(self, side: str) -> str:
        """How errors name an argument, ``train`` or ``query``."""
        text = getattr(self.call, side)
        return f"{self.name}({side} := {'NULL' if text is None else literal(text)})"

    def side(self, side: str) -> str:
        """What stands in FROM for an argument: a relation as it is, or a split at the call's checkpoint."""
        return _side(self.where(side), getattr(self.call, side), self.call.checkpoint, self.source, self.relations)


@dataclass(frozen=True)
class Operator:
    """A short form: its name, its columns, and the SQL it stands for.

    The sides of that SQL are called after the arguments, so that DuckDB's errors make sense to the caller, and it
    restricts one gradient of the two to the layers asked for, ``{query_gradient}`` or ``{train_gradient}``: that
    of the side that is averaged first. ``fill`` gives what stands for each side, and what else is in braces.
    """

    name: str
    columns: tuple[str, ...]
    sql: str
    fill: Callable[[Asked], dict[str, str]]


SIDES = ("train", "query")
# By the names of the arguments.
DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(Call)}


def stands_for(operator: Operator, call: Call, source: StoreSource, relations: tuple[str, ...]) -> str:
    """The SQL text that a call stands for, with ``relations`` as in ``Asked``.

    QueryError and UnknownNameError for arguments that can't be meant so; whether relations have the columns is left to
    DuckDB, which sees what the caller sees.
    """
    if not call.layers:
        given = "NULL" if call.layers is None else literal(call.layers)
        raise QueryError(f"{operator.name}(layers := {given}): give a layer pattern, or '*' for all layers")
    if call.layers != "*":
        source.space.select(call.layers)
    filled = operator.fill(Asked(operator.name, call, source, relations))
    gradients = {f"{side}_gradient": _restricted(f"{side}.gradient", call.layers) for side in SIDES}
    return operator.sql.format(**filled, **gradients)


def both_sides(asked: Asked) -> dict[str, str]:
    """``train`` and ``query``, as they are asked for."""
    return {side: asked.side(side) for side in SIDES}


def returns_sql(operator: Operator, session: Session) -> Function:
    """``metaql_p2b(schema, relations, search path, train, query, layers, checkpoint)``: the planned SQL text.

    The names in ``relations`` are the schema's own, unless the schema is in the search path, which then says
    what every name means.
    """

    # DuckDB counts the parameters.
    def evaluate(a: Any, b: Any, c: Any, d: Any, e: Any, f: Any, g: Any) -> pa.Array:
        calls = zip(*(references.array(each).to_pylist() for each in (a, b, c, d, e, f, g)), strict=True)
        return column([text(*call) for call in calls], pa.string())

    def text(schema: str, relations: list[str], search_path: str, *arguments: Any) -> str:
        own = () if f"{schema}.main" in search_path.replace('"', "").split(",") else tuple(relations)
        source = session.source(schema)
        plain = stands_for(operator, Call(*arguments), source, own)
        return plain if session.plan is None else session.plan(plain, source, search_path)

    parameters = ("VARCHAR", "VARCHAR[]", "VARCHAR", "VARCHAR", "VARCHAR", "VARCHAR", "BIGINT")
    return Function(f"metaql_{operator.name}", parameters, "VARCHAR", evaluate)


def _restricted(gradient: str, layers: str) -> str:
    return gradient if layers == "*" else f"layers({gradient}, {literal(layers)})"


def _side(where: str, text: str | None, checkpoint: int | None, source: StoreSource, relations: tuple[str, ...]) -> str:
    """What stands in FROM for an argument; ``where`` names it in errors."""
    if text is None:
        raise QueryError(f"{where}: give a relation's name, or a SELECT that yields sample_id and gradient")
    if checkpoint is not None:
        return _split_at(where, text, checkpoint, source)
    for name in relations:
        if name.lower() == text.lower():
            return f"{quoted(source.name)}.main.{quoted(name)}"
    if _NAME.fullmatch(text):
        # As DuckDB would read it, but also where a name happens to be a word of SQL.
        parts = re.findall(_PART, text)
        return ".".join(part if part.startswith('"') else quoted(part) for part in parts)
    select = _select(where, text)
    if select is None:
        return quoted(text)
    own = (name for name in relations if name.lower() in text.lower())
    shadows = ", ".join(f"{quoted(name)} AS (FROM {quoted(source.name)}.main.{quoted(name)})" for name in own)
    # The text may end in a comment, hence the line break.
    return f"(WITH {shadows} FROM ({select}\n))" if shadows else f"({select}\n)"


def _select(where: str, text: str) -> str | None:
    """The text of the one SELECT in it; None for what can only be a name, with spaces in it for instance."""
    try:
        statements = duckdb.extract_statements(text)
    except duckdb.ParserException as error:
        if not _BEGINS_A_QUERY.match(text):
            return None
        raise QueryError(f"{where}: {str(error).strip()}") from None
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise QueryError(f"{where}: give a relation's name, or one SELECT and nothing else")
    if statements[0].named_parameters:
        raise QueryError(f"{where}: parameters of the query around it can't be seen in a text; write their values")
    return statements[0].query.rstrip().rstrip(";")


def _split_at(where: str, text: str, checkpoint: int, source: StoreSource) -> str:
    """A split's gradients at a checkpoint, where there are any."""
    collected: dict[str, set[int]] = {}
    for collection in source.store.manifest.collections:
        if collection.checkpoint is not None:
            collected.setdefault(collection.split, set()).add(collection.checkpoint)
    split = next((split for split in collected if split.lower() == text.lower()), None)
    if split is None:
        raise QueryError(
            f"{where}: with a checkpoint it must be one of the splits {', '.join(collected)}. A SELECT from gradients"
            " can say itself which checkpoint it wants"
        )
    if checkpoint not in collected[split]:
        there = ", ".join(map(str, sorted(collected[split])))
        raise UnknownNameError(
            f"{where}: there are no gradients of '{split}' at checkpoint {checkpoint}, but at {there}"
        )
    return (
        f"(SELECT sample_id, gradient FROM {quoted(source.name)}.main.gradients"
        f" WHERE split = {literal(split)} AND checkpoint = {checkpoint})"
    )
