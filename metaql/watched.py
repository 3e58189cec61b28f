"""Runs what takes DuckDB long so that Ctrl-C stops it, and a progress bar says how far it is.

DuckDB 2.0 hears of a Ctrl-C while it waits for its threads, and then waits until they are done. So what may take long
runs in another thread while the main one waits in Python, where signals arrive, and interrupts the query itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import duckdb

from metaql.progress import Progress
from metaql.udfs.work import Work

Result = TypeVar("Result")

# How often the waiting thread looks up, in seconds.
TICK = 0.1
# Kept from query to query, so that buffers that belong to a thread are too.
_threads = ThreadPoolExecutor(thread_name_prefix="metaql")
# What the queries of a connection or cursor compute with.
_works: WeakKeyDictionary[duckdb.DuckDBPyConnection, Work] = WeakKeyDictionary()


class Relation(duckdb.DuckDBPyRelation):
    """DuckDB's relation; looking at it can be stopped, and so can looking at what is derived from it."""

    __slots__ = ()

    def _submit(self, *arguments: Any, **options: Any) -> Any:
        return watched(self._con, lambda: super(Relation, self)._submit(*arguments, **options))

    def _write(self, *arguments: Any, **options: Any) -> Any:
        return watched(self._con, lambda: super(Relation, self)._write(*arguments, **options))

    def _derive(self, *arguments: Any, **options: Any) -> Any:
        return as_watched(super()._derive(*arguments, **options))


def as_watched(relation: Any) -> Any:
    """The same relation, watched when it is looked at; what is no relation as it is."""
    if type(relation) is duckdb.DuckDBPyRelation:
        relation.__class__ = Relation
    return relation


def watch(connection: duckdb.DuckDBPyConnection, work: Work) -> None:
    """Makes ``watched`` know what this connection's queries compute with."""
    _works[connection] = work


def watched(connection: duckdb.DuckDBPyConnection, call: Callable[[], Result]) -> Result:
    """What the call returns; KeyboardInterrupt once it was stopped by Ctrl-C, and its connection is free again.

    Only the main thread hears of signals, so that in others this is the call itself.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    future = _threads.submit(call)
    work = _works[connection]
    try:
        with Progress(connection, work) as progress:
            while not wait((future,), TICK).done:
                progress.show()
    except BaseException:
        with work.stopped():
            _interrupt(connection, future)
        raise
    try:
        return future.result()
    except duckdb.CatalogException:
        # A view of a DataFrame: DuckDB looks for it in the variables of the thread that calls, and finds none there.
        return call()


def _interrupt(connection: duckdb.DuckDBPyConnection, future: Future[Any]) -> None:
    # Again and again: a query forgets what came before its first step.
    while not wait((future,), TICK / 10).done:
        connection.interrupt()
