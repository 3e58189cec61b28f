"""Plans SQL that functions return while DuckDB binds a query, also in connections that are not ours."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import duckdb

from metaql.catalogue import Catalogue, Names
from metaql.execute import scalar_functions
from metaql.planner import Plans
from metaql.udfs.quoting import literal
from metaql.udfs.sources import StoreSource


class LatePlanner:
    """Looks at relations on another cursor: the query that is being bound keeps its own busy.

    What other cursors can't see, such as temporary tables, leaves a text unplanned.
    """

    def __init__(self, connection: duckdb.DuckDBPyConnection) -> None:
        # The connection's functions hold this; if this held the connection, it would never be closed.
        self._connection = weakref.ref(connection)
        self._state = threading.local()
        self._plans: defaultdict[tuple[str, str], Plans] = defaultdict(Plans)

    def __call__(self, text: str, source: StoreSource, search_path: str) -> str:
        """The text planned under that search path; the same text where that is not possible."""
        # Looking at a view may bind another short form, whose columns are all that counts then.
        if getattr(self._state, "planning", False):
            return text
        self._state.planning = True
        try:
            with self._cursor() as cursor:
                return self._planned(text, source, search_path, cursor)
        finally:
            self._state.planning = False

    def _planned(self, text: str, source: StoreSource, search_path: str, cursor: duckdb.DuckDBPyConnection) -> str:
        try:
            cursor.execute(f"SET search_path = {literal(search_path)}")
        except duckdb.Error:
            # A schema that the caller's transaction has made can't be seen from here.
            return text
        splits = tuple(dict.fromkeys(one.split for one in source.store.manifest.collections))
        # Patterns in a caller's SELECT may be another store's; the functions check them.
        names = Names(source.name, splits, lambda pattern: None)
        database = CursorDatabase(cursor, lambda: self._scalar_functions)
        # A query is bound more than once before it has run; a text means the same under the same search path only.
        planned = self._plans[source.name, search_path].plan(text, Catalogue(database, names)).text
        try:
            database.describe(planned)
        except duckdb.Error:
            # An error is easier to understand in the plain text.
            return text
        return planned

    @cached_property
    def _scalar_functions(self) -> frozenset[str]:
        with self._cursor() as cursor:
            return scalar_functions(cursor)

    def _cursor(self) -> duckdb.DuckDBPyConnection:
        connection = self._connection()
        assert connection is not None, "functions are gone with the connection that registered them"
        return connection.cursor()


class CursorDatabase:
    """A cursor of a connection of which nothing is known but what it answers."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, functions: Callable[[], frozenset[str]]) -> None:
        self._cursor, self._functions = cursor, functions

    def describe(self, query: str) -> list[tuple[str, str]]:
        """Names and types of a query's columns; runs nothing."""
        relation = self._cursor.sql(query)
        return list(zip(relation.columns, map(str, relation.types), strict=True))

    def answer(self, query: str) -> list[tuple[Any, ...]]:
        """A query's rows."""
        return self._cursor.execute(query).fetchall()

    def is_scalar(self, name: str) -> bool:
        """Whether a function of this name, in lower case, is surely no aggregate."""
        return name in self._functions()

    def is_relation(self, database: str, schema: str, name: str) -> bool:
        """Not asked, as there is no schema to ask it of."""
        raise NotImplementedError

    def views(self) -> dict[str, str]:
        """None: views are not looked into."""
        return {}

    @property
    def own(self) -> tuple[tuple[str, str], ...] | None:
        """None: the caller's settings decide where names are looked up."""
        return None
