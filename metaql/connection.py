"""``metaql.connect``, and the way of a query: parse, bind, rewrite, compile, run."""

from __future__ import annotations

import sys
import warnings
from functools import partial
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import duckdb
import torch

from metaql.calibrate import constants
from metaql.catalogue import Catalogue, Names, Stretch
from metaql.database import GradientViews, QueryDatabase
from metaql.errors import QueryError, StoreError
from metaql.execute import Executor, Parameters, averages_gradients
from metaql.explain import FEWEST_PAIRS, Explainer, is_explained
from metaql.late_planner import LatePlanner
from metaql.parse import mentions_gradients
from metaql.planner import Plan, Plans
from metaql.relations import create_relations, create_short_forms, free_name, require_free
from metaql.short_forms import expand, may_hold_relations
from metaql.storage.store import Store
from metaql.strategies import stretch
from metaql.udfs.device import DeviceBlocks, device_of, free_bytes
from metaql.udfs.models import Model
from metaql.udfs.quoting import quoted
from metaql.udfs.register import new_session, register_restore, session_of
from metaql.udfs.session import Session, find
from metaql.udfs.sources import StoreSource

if TYPE_CHECKING:
    from torch import nn

NAME = "metaql"
# To DuckDB, a database that no other connection has.
_IN_MEMORY = ":memory:"
# What DuckDB says of a text before it runs any of it.
_REFUSALS = (duckdb.BinderException, duckdb.ParserException, duckdb.CatalogException, duckdb.NotImplementedException)
# What DuckDB says of a sub-query that stands where it was not replaced.
_NO_SUB_QUERIES = "Table function cannot contain subqueries"
_BUG = (
    "MetaQL could not plan this query, so that it runs pair by pair: slower, and right. This is a bug of ours; please"
    " report it with the query and this: {}"
)


class Connection:
    """A DuckDB that knows what a gradient is; made by ``metaql.connect``. Threads may share it."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, store: Store, database: str, session: Session, new: bool
    ) -> None:
        own = connection.execute("SELECT current_database()").fetchone()
        assert own is not None
        path = f"{quoted(own[0])}.main,{quoted(database)}.main"
        self._executor: Executor | None = Executor(connection, own[0], path, session, new)
        self._views = GradientViews(self._executor)
        self._store = store
        splits = tuple(dict.fromkeys(one.split for one in store.manifest.collections))
        # Functions hold the session; it goes when they do.
        self._session, self._source = session.id, session.source(database)
        self._names = Names(database, splits, self._source.space.select, self._stretch)
        self._store_pairs = max((one.rows for one in store.manifest.collections), default=0) ** 2
        self._plans = Plans()

    def sql(self, query: str, params: Parameters = None) -> Any:
        """The query's result as a DuckDB relation: ``.show()``, ``.fetchall()``, ``.df()``, ``.pl()``, ….

        It runs when it is looked at, and again each time. Parameters are ``?``, ``$1`` or ``$name``. Statements
        that are no query run at once.
        """
        executor, frame = self._open(), sys._getframe(1)
        if may_hold_relations(query) and ";" in query:
            query = self._last_of(query, params, frame)
        if mentions_gradients(query, self._views.words()):
            plan = self._plan(query, frame)
            if is_explained(plan):
                lines = self._explainer(frame).explained(plan, lambda text: executor.run(text, params, frame))
                return executor.run("SELECT unnest(?::VARCHAR[]) AS plan", [lines], frame)
            self._warn_of_minutes(plan, frame)
            return self._run(plan, query, params, frame)
        try:
            return executor.run(query, params, frame, plain=True)
        except duckdb.Error as error:
            if not averages_gradients(error):
                raise
            planned = self._planned(query, frame)
            if planned == query:
                raise
        return executor.run(planned, params, frame)

    def _last_of(self, text: str, params: Parameters, frame: FrameType) -> str:
        """The last of several statements, after the others have run: none but single ones can be changed."""
        statements = duckdb.extract_statements(text)
        for statement in statements[:-1]:
            plan = self._plan(statement.query, frame)
            result = self._open().run(plan.text, params, frame)
            if result is not None:
                result.fetchall()
        return statements[-1].query if statements else text

    def _run(self, plan: Plan, query: str, params: Parameters, frame: FrameType) -> Any:
        """What DuckDB makes of the plan. What it refuses is told in the user's own text, if that is refused too."""
        executor = self._open()
        try:
            return executor.run(plan.text, params, frame)
        except _REFUSALS as refusal:
            if _NO_SUB_QUERIES in str(refusal):
                raise QueryError(
                    "a function in FROM takes a sub-query only in SELECT, CREATE TABLE or VIEW, INSERT and COPY: keep"
                    " its result in a table first, or give the sub-query as a text in quotes"
                ) from None
            if plan.text == query or may_hold_relations(query):
                raise
            try:
                result = executor.run(query, params, frame)
            except duckdb.Error as error:
                raise (refusal if averages_gradients(error) else error) from None
            warnings.warn(_BUG.format(refusal), stacklevel=3)
            return result

    def register(self, name: str, table: Any) -> None:
        """Makes a DataFrame or an Arrow table known under a name."""
        self._open().register(name, table)

    def close(self) -> None:
        """Closes DuckDB and the store; relations of this connection can't be looked at any more."""
        if self._executor is not None:
            self._executor.close()
            self._store.close()
            self._executor = None

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _planned(self, query: str, frame: FrameType) -> str:
        return self._plan(query, frame).text

    def _plan(self, query: str, frame: FrameType) -> Plan:
        database = QueryDatabase(self._open(), self._views, frame)
        catalogue = Catalogue(database, self._names)
        try:
            return self._plans.plan(expand(query, self._source, catalogue), catalogue)
        except (QueryError, StoreError, duckdb.Error):
            raise
        except Exception as error:
            warnings.warn(_BUG.format(repr(error)), stacklevel=4)
            return Plan(query)

    def _warn_of_minutes(self, plan: Plan, frame: FrameType) -> None:
        """Tells the user of a query that will run for minutes; once for each text."""
        if plan.warned or not plan.selects or self._store_pairs < FEWEST_PAIRS:
            return
        plan.warned = True
        remark = self._explainer(frame).warning(plan)
        if remark is not None:
            warnings.warn(remark, stacklevel=3)

    def _explainer(self, frame: FrameType) -> Explainer:
        session = find(self._session)
        assert session is not None, "the session lives as long as the connection"
        catalogue = Catalogue(QueryDatabase(self._open(), self._views, frame), self._names)
        return Explainer(catalogue, self._source, session)

    def _stretch(self, split: str, rows: float) -> Stretch | None:
        session = find(self._session)
        return None if session is None else stretch(self._source, session.costs, split, rows)

    def _open(self) -> Executor:
        if self._executor is None:
            raise QueryError(f"this connection to {self._store.path} is closed: call metaql.connect again")
        return self._executor


def connect(
    path: str | Path,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    database: str | Path = _IN_MEMORY,
) -> Connection:
    """Opens the newest version of a store to ask it in SQL.

    ``model`` is what ``gradient(input, target)`` runs, ``device`` where scores are computed, and ``database`` the
    DuckDB file for the user's own tables; nothing of the store is written there.
    """
    store = Store.open(path)
    connection = duckdb.connect(str(database))
    try:
        new = database == _IN_MEMORY
        session = new_session(connection) if new else session_of(connection)
        name = free_name(connection, NAME)
        remarks = _load(connection, session, store, name, model, device)
        opened = Connection(connection, store, name, session, new)
    except BaseException:
        connection.close()
        store.close()
        raise
    _warn(remarks)
    return opened


def load(
    connection: duckdb.DuckDBPyConnection,
    path: str | Path,
    schema: str = NAME,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
) -> None:
    """Adds a store's relations to a DuckDB connection as ``schema.train`` and so on, and the functions on them.

    Its SQL goes to DuckDB directly: every function is right there, pair by pair, and ``avg(gradient)`` does not
    exist. Only ``schema.p2b(…)`` and the other short forms are planned. Several stores can be loaded, each under a
    schema of its own.
    """
    store = Store.open(path)
    try:
        require_free(connection, schema)
        remarks = _load(connection, session_of(connection), store, schema, model, device)
    except BaseException:
        store.close()
        raise
    _warn(remarks)


def _load(
    connection: duckdb.DuckDBPyConnection,
    session: Session,
    store: Store,
    name: str,
    model: nn.Module | None,
    device: str | torch.device | None,
) -> list[str]:
    """Relations, which call the session's functions: if they can't be made, the session knows of no store."""
    chosen = device_of(device)
    remarks = create_relations(connection, store, name)
    source = StoreSource(store, name, None if chosen is None else DeviceBlocks(store, chosen, free_bytes(chosen)))
    session.add(source)
    session.measure = partial(constants, device)
    if model is not None:
        from metaql.storage.replay import Replay

        session.add_model(Model(Replay(model, store), source))
    register_restore(connection, session)
    if session.plan is None:
        session.plan = LatePlanner(connection)
    create_short_forms(connection, store, name)
    return remarks


def _warn(remarks: list[str]) -> None:
    for remark in remarks:
        warnings.warn(remark, stacklevel=3)
