"""Runs SQL on DuckDB so that relations, frames and cursors behave as they do in DuckDB itself."""

from __future__ import annotations

import atexit
import re
import weakref
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import duckdb

from metaql import progress
from metaql.parse import is_query
from metaql.udfs.references import GRADIENT
from metaql.udfs.session import Session
from metaql.watched import as_watched, watch, watched

Parameters = list[Any] | tuple[Any, ...] | dict[str, Any] | None

# Statements whose effects belong to one connection and are not seen by its cursors.
_OWN_STATE = re.compile(
    r"(^|;)\s*(set|reset|use|begin|start|prepare|pragma|load|create\s+(or\s+replace\s+)?(temp|temporary))\b",
    re.IGNORECASE,
)
# Statements after which names may be looked up in another database.
_OWN_PATH = re.compile(r"(^|;)\s*(use|set\s+(search_path|schema)|set\s+session\s+\w+|reset|pragma)\b", re.IGNORECASE)
# Statements after which there may be other views or functions.
_MADE = re.compile(
    r"\b(view|macro|function|attach|detach|import|rollback|load|copy\s+from\s+database)\b", re.IGNORECASE
)
# DuckDB looks for DataFrames in the frame that calls it, which this makes look like the user's own.
_CALL = compile("__metaql_cursor__.sql(__metaql_text__, params=__metaql_parameters__)", "<metaql>", "eval")


# DuckDB complains at exit about functions in connections that nobody closed.
_open: weakref.WeakSet[duckdb.DuckDBPyConnection] = weakref.WeakSet()
# A relation keeps its cursor alive, and this the connection behind it: functions are gone with the connection that
# registered them, and DuckDB 2.0.0 crashes when a cursor calls one after that.
_parents: weakref.WeakKeyDictionary[duckdb.DuckDBPyConnection, duckdb.DuckDBPyConnection]
_parents = weakref.WeakKeyDictionary()


@atexit.register
def _close_all() -> None:
    # Cursors first: a result that is read half may still be computed by other threads, which call our functions.
    for cursor in list(_parents):
        cursor.close()
    for connection in list(_open):
        connection.close()


class Executor:
    """A DuckDB connection whose queries each get a cursor, so that none waits for another's result.

    Temporary tables, settings, transactions and the like belong to one connection. From the first statement that
    makes any on, queries run on that connection too, and one after another, as in DuckDB.

    ``has_own_path`` says whether a statement may have changed where names are looked up, and ``changes`` counts those
    after which there may be other views or functions. In a ``new`` database there are none but ours at first.
    """

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, own: str, search_path: str, session: Session, new: bool
    ) -> None:
        self._connection, self.own = connection, own
        self._registered: dict[str, Any] = {}
        self._has_own_state = False
        self.has_own_path = False
        self.changes = 0
        self._new, self._own_functions = new, session.functions
        # What there was at the last change, if it was listed since.
        self._scalar_functions: tuple[int, frozenset[str]] | None = None
        self._set_path = duckdb.extract_statements(f"SET search_path = '{search_path}'")[0]
        self._work = session.work
        self._prepare(connection)
        _open.add(connection)

    def run(self, text: str, parameters: Parameters, frame: FrameType, plain: bool = False) -> Any:
        """DuckDB's relation for a query; statements run at once.

        A ``plain`` text has nothing to do with gradients: it runs as DuckDB runs it, and is stopped as DuckDB stops.
        """
        if plain:
            return self._run_plain(text, parameters, frame)
        if is_query(text) and not self._has_own_state:
            return as_watched(_call(self._cursor(), text, parameters, frame))
        if not is_query(text):
            self._note(text)
            return watched(self._connection, lambda: _call(self._connection, text, parameters, frame))
        return as_watched(_call(self._connection, text, parameters, frame))

    def _run_plain(self, text: str, parameters: Parameters, frame: FrameType) -> Any:
        if not is_query(text):
            self._note(text)
        own = self._has_own_state or not is_query(text)
        return _call(self._connection if own else self._cursor(), text, parameters, frame)

    def _note(self, text: str) -> None:
        """What a statement may change for those that come after it."""
        self.changes += _MADE.search(text) is not None
        self._has_own_state |= _OWN_STATE.search(text) is not None
        self.has_own_path |= _OWN_PATH.search(text) is not None

    def caller(self, frame: FrameType) -> tuple[Callable[[str], Any], Callable[[str, str, str], bool]]:
        """Two functions on one cursor: DuckDB's relations for queries in the user's frame, and ``is_relation``."""
        cursor = self._connection if self._has_own_state else self._cursor()
        return lambda text: _call(cursor, text, None, frame), partial(_is_relation, cursor)

    @property
    def own_schemas(self) -> tuple[tuple[str, str], ...] | None:
        """The databases and schemas that the user's own relations are in.

        None once a statement may have changed where names are looked up.
        """
        return None if self.has_own_path else ((self.own, "main"), ("temp", "main"))

    def is_scalar(self, name: str) -> bool:
        """Whether a function of this name, in lower case, is surely no aggregate."""
        if self._is_as_made and name in self._own_functions:
            return True
        # DuckDB takes 20 ms to list its functions.
        if self._scalar_functions is None or self._scalar_functions[0] != self.changes:
            self._scalar_functions = self.changes, scalar_functions(self._connection.cursor())
        return name in self._scalar_functions[1]

    @property
    def _is_as_made(self) -> bool:
        return self._new and not self.changes

    def views(self) -> list[tuple[str, str]]:
        """The user's own views: names in lower case, and CREATE statements."""
        if self._is_as_made:
            return []
        # Temporary ones are seen by the connection that made them only.
        listing = self._connection if self._has_own_state else self._connection.cursor()
        return listing.execute(
            "SELECT lower(view_name), sql FROM duckdb_views() WHERE NOT internal AND database_name IN (?, 'temp')",
            [self.own],
        ).fetchall()

    def register(self, name: str, table: Any) -> None:
        """Makes a table known to this connection and to all its cursors from now on."""
        self._connection.register(name, table)
        self._registered[name] = table

    def close(self) -> None:
        """Closes the connection with its cursors."""
        self._connection.close()

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        cursor = self._connection.cursor()
        _parents[cursor] = self._connection
        self._prepare(cursor)
        for name, table in self._registered.items():
            cursor.register(name, table)
        return cursor

    def _prepare(self, connection: duckdb.DuckDBPyConnection) -> None:
        connection.execute(self._set_path)
        if progress.is_shown():
            connection.execute(progress.MEASURE)
        watch(connection, self._work)


def scalar_functions(cursor: duckdb.DuckDBPyConnection) -> frozenset[str]:
    """Names of functions that are no aggregates; macros are left out but ours, as others may hold one."""
    rows = cursor.execute(
        "SELECT lower(function_name) FROM duckdb_functions() GROUP BY ALL"
        " HAVING bool_and((internal AND function_type <> 'aggregate')"
        " OR coalesce(starts_with(macro_definition, 'metaql_'), false))"
    )
    return frozenset(name for (name,) in rows.fetchall())


def averages_gradients(error: duckdb.Error) -> bool:
    """Whether DuckDB refused an avg or sum over gradients, which a plan turns into something it can do."""
    return isinstance(error, duckdb.BinderException) and f"({GRADIENT}" in str(error)


def _is_relation(cursor: Any, database: str, schema: str, name: str) -> bool:
    """Whether a schema has a table or a view of that name."""
    # A query that can't be bound takes DuckDB longer, the first time seven milliseconds: it looks for similar names.
    return bool(cursor._table_kind((database, schema, name)) != "none")


def _call(cursor: Any, text: str, parameters: Parameters, frame: FrameType) -> Any:
    local = {
        **frame.f_locals,
        "__metaql_cursor__": cursor,
        "__metaql_text__": text,
        "__metaql_parameters__": parameters,
    }
    return eval(_CALL, frame.f_globals, local)
