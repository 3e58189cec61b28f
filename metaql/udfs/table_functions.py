"""What the functions in FROM share (``p2b(…)``, ``elite(…)``): from a call's arguments to the SQL it stands for.

DuckDB has no table functions in Python. ``query(text)`` runs a text that it evaluates when a query is bound, so a
scalar function that returns SQL acts as one, and the macro in front of it (``relations.py``) gives its arguments
names and defaults. In text of our own (``short_forms.py``) that SQL stands in the call's place, and arguments may be
whatever SQL allows there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import duckdb
import pyarrow as pa

from metaql.errors import QueryError
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
class Given:
    """An argument that is no constant: a sub-query or an expression, as SQL."""

    sql: str


@dataclass(frozen=True)
class Asked:
    """A call of the table function ``name``, and where it stands.

    ``relations`` are the names that mean relations of the store's schema whatever else there is of that name; all
    others mean what they mean where the call stands. ``columns`` are those of the arguments that are relations, by
    the arguments' names, where they are known.
    """

    name: str
    call: Any
    source: StoreSource
    relations: tuple[str, ...] = ()
    columns: Mapping[str, list[str]] = field(default_factory=dict)

    def where(self, argument: str) -> str:
        """How errors name an argument."""
        value = getattr(self.call, argument)
        if isinstance(value, Given):
            return f"{self.name}({argument} := …)"
        return f"{self.name}({argument} := {'NULL' if value is None else literal(str(value))})"

    def relation(self, argument: str, what: str) -> str:
        """What stands in FROM for an argument; ``what`` says to whom gave NULL what a SELECT must yield."""
        value = getattr(self.call, argument)
        if value is None:
            raise QueryError(f"{self.where(argument)}: give a relation's name, or a SELECT that yields {what}")
        if isinstance(value, Given):
            return f"({value.sql})"
        return _relation(self.where(argument), str(value), self.source, self.relations)


@dataclass(frozen=True)
class TableFunction:
    """A function in FROM: its name, its columns, and the SQL it stands for.

    ``call`` is a dataclass: the arguments in their order with their defaults; SQL may give NULL for any. ``types`` are
    DuckDB's for them, None for any. Those in ``relations`` may be sub-queries or bare names, and where there are such,
    the others any expressions; in a text that is not ours all are constants.
    """

    name: str
    columns: tuple[str, ...]
    call: type[Any]
    sql: Callable[[Asked], str]
    types: tuple[str, ...] | None = None
    relations: tuple[str, ...] = ()

    @property
    def defaults(self) -> dict[str, Any]:
        """By the names of the arguments."""
        return {each.name: each.default for each in fields(self.call)}


def returns_sql(function: TableFunction, session: Session) -> Function:
    """``metaql_p2b(schema, relations, search path, train, query, layers, checkpoint)``: the planned SQL text.

    The names in ``relations`` are the schema's own, unless the schema is in the search path, which then says
    what every name means.
    """

    def evaluate(*columns: Any) -> pa.Array:
        calls = zip(*(references.array(each).to_pylist() for each in columns), strict=True)
        return column([text(*call) for call in calls], pa.string())

    def text(schema: str, relations: list[str], search_path: str, *arguments: Any) -> str:
        own = () if f"{schema}.main" in search_path.replace('"', "").split(",") else tuple(relations)
        source = session.source(schema)
        plain = function.sql(Asked(function.name, function.call(*arguments), source, own))
        return plain if session.plan is None else session.plan(plain, source, search_path)

    types = None if function.types is None else ("VARCHAR", "VARCHAR[]", "VARCHAR", *function.types)
    return Function(f"metaql_{function.name}", types, "VARCHAR", evaluate)


def _relation(where: str, text: str, source: StoreSource, relations: tuple[str, ...]) -> str:
    """What stands in FROM for a relation's name or the text of a SELECT; ``where`` names the argument in errors."""
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
