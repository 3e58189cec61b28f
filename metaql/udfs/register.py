"""Puts the functions into a DuckDB instance, once, however many stores are loaded into it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import Parameter, Signature
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from duckdb.func import FunctionNullHandling, PythonUDFType

from metaql.errors import QueryError
from metaql.storage.arrow_arrays import primitive
from metaql.udfs import references
from metaql.udfs.aggregates import mean, total
from metaql.udfs.anomaly_score import anomaly_score
from metaql.udfs.b2b import B2B
from metaql.udfs.b2p import B2P
from metaql.udfs.best import best
from metaql.udfs.cosine_similarity import cosine_similarity
from metaql.udfs.elite import ELITE
from metaql.udfs.elite_candidates import ELITE_CANDIDATES, elite_chosen
from metaql.udfs.elite_fit import elite_fit
from metaql.udfs.embedding import embedding, logits, shape
from metaql.udfs.function import Function
from metaql.udfs.gradient import gradient
from metaql.udfs.hydra import HYDRA
from metaql.udfs.hydra_weights import hydra_weights
from metaql.udfs.in_run import IN_RUN
from metaql.udfs.inner_product import inner_product
from metaql.udfs.layers import layers
from metaql.udfs.members import members
from metaql.udfs.norm import norm
from metaql.udfs.p2b import P2B
from metaql.udfs.p2p import P2P
from metaql.udfs.precondition import MACRO, precondition
from metaql.udfs.restore import restore
from metaql.udfs.scan import scan
from metaql.udfs.score import score
from metaql.udfs.scores import scores
from metaql.udfs.session import Session, find
from metaql.udfs.table_functions import returns_sql
from metaql.udfs.tracin import TRACIN

TABLE_FUNCTIONS = (P2P, P2B, B2P, B2B, HYDRA, TRACIN, IN_RUN, ELITE, ELITE_CANDIDATES)
FUNCTIONS: tuple[Callable[[Session], Function], ...] = (
    inner_product,
    score,
    scan,
    cosine_similarity,
    norm,
    layers,
    restore,
    gradient,
    precondition,
    mean,
    total,
    *(partial(returns_sql, function) for function in TABLE_FUNCTIONS),
    members,
    scores,
    best,
    logits,
    shape,
    embedding,
    hydra_weights,
    elite_fit,
    elite_chosen,
    anomaly_score,
)
# Tells a second load which session the instance's functions belong to.
_SESSION = "metaql_session"


def session_of(connection: duckdb.DuckDBPyConnection) -> Session:
    """The session of a connection's instance; made, with its functions, when the instance has none."""
    # DuckDB looks for names like one that it does not know, among all it has: that takes it milliseconds.
    try:
        row = connection.cursor().execute(f"SELECT {_SESSION}(0)").fetchone()
    except duckdb.CatalogException:
        row = None
    if row is not None:
        session = find(row[0])
        assert session is not None
        return session
    return new_session(connection)


def new_session(connection: duckdb.DuckDBPyConnection) -> Session:
    """A session for an instance that has none yet, and its functions."""
    session = Session()
    session.functions = frozenset([MACRO])
    for make in FUNCTIONS:
        function = make(session)
        session.functions |= {function.name}
        if make is not restore:
            _register(connection, function)
    _register(connection, _identity(session))
    return session


def register_restore(connection: duckdb.DuckDBPyConnection, session: Session) -> None:
    """``restore`` in the type that the loaded stores call for; again when that has changed."""
    function = restore(session)
    if session.restored_as == function.returns:
        return
    if session.restored_as is not None:
        _remove(connection, function.name)
    _register(connection, function)
    session.restored_as = function.returns


def _remove(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    try:
        connection.remove_function(name)
    except duckdb.InvalidInputException:
        # DuckDB lets only the connection that registered a function remove it.
        raise QueryError(
            "this store is float64 and restore(…) was registered for float32 by another cursor of this database:"
            " load the float64 store first, or on the same connection object"
        ) from None


def _identity(session: Session) -> Function:
    identity = session.id

    def evaluate(values: Any) -> pa.Array:
        return primitive(np.full(len(references.array(values)), identity, dtype=np.int64), pa.int64())

    return Function(_SESSION, ("BIGINT",), "BIGINT", evaluate)


def _register(connection: duckdb.DuckDBPyConnection, function: Function) -> None:
    # DuckDB would have Python evaluate the annotations, which takes longer than all the rest.
    function.evaluate.__signature__ = _signature(function)  # type: ignore[attr-defined]
    connection.create_function(
        function.name,
        function.evaluate,
        None if function.parameters is None else list(function.parameters),
        function.returns,
        type=PythonUDFType.ARROW,
        null_handling=FunctionNullHandling.SPECIAL,
    )


def _signature(function: Function) -> Signature:
    if function.parameters is None:
        return Signature([Parameter("_", Parameter.VAR_POSITIONAL)])
    return Signature([Parameter(f"_{place}", Parameter.POSITIONAL_ONLY) for place in range(len(function.parameters))])
