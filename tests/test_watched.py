"""Long queries can be stopped, and say how far they are."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest

import metaql
from metaql.connection import Connection
from metaql.udfs.register import session_of
from metaql.udfs.work import Work
from metaql.watched import Relation
from tests.interrupted_queries import FOREVER, SHORT, WAYS

SCRIPT = Path(__file__).with_name("interrupted_queries.py")


@pytest.fixture
def db(small_store: Path) -> Iterator[Connection]:
    with metaql.connect(small_store) as connection:
        yield connection


def test_ctrl_c_stops_queries_and_leaves_the_connection_usable(small_store: Path) -> None:
    command = [sys.executable, "-W", "error", SCRIPT, small_store]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        for way in WAYS:
            assert asking.stdout.readline() == f"asks {way}\n"
            time.sleep(0.3)
            asking.send_signal(signal.SIGINT)
            begin = time.monotonic()
            assert asking.stdout.readline() == f"interrupted {way}\n"
            assert time.monotonic() - begin < 3, way
    assert asking.returncode == 0


def test_what_is_derived_from_a_relation_is_watched_too(db: Connection) -> None:
    relation = db.sql("SELECT sample_id, norm(gradient) AS size FROM train")
    for derived in (relation, relation.filter("size > 0"), relation.order("size").limit(3), relation.union(relation)):
        # DuckDB may change how its relations run; then this says so before a user's Ctrl-C does.
        assert type(derived) is Relation
        assert isinstance(derived, duckdb.DuckDBPyRelation)
        assert len(derived.fetchall()) > 0
    assert db.sql("SELECT count(*) FROM relation").fetchall() == [(8,)]


def test_an_error_while_rows_are_computed_is_the_users(db: Connection) -> None:
    relation = db.sql("SELECT restore(gradient, 'nothing.' || sample_id) FROM train")
    for _ in range(2):
        with pytest.raises(duckdb.InvalidInputException, match="no recorded parameter matches"):
            relation.fetchall()
    assert db.sql(SHORT).fetchall() == [(40, True)]


def test_a_long_computation_goes_on_until_it_is_stopped(db: Connection) -> None:
    work = session_of(db._executor._connection).work  # type: ignore[union-attr]
    queries = (SHORT, "SELECT norm(avg(gradient)) FROM train", "SELECT norm(gradient) FROM train")
    with work.stopped():
        for query in queries:
            with pytest.raises(duckdb.InvalidInputException, match="stopped by Ctrl-C"):
                db.sql(query).fetchall()
    for query in queries:
        assert db.sql(query).fetchall()


def test_threads_ask_side_by_side(db: Connection) -> None:
    results: list[Any] = []
    threads = [threading.Thread(target=lambda: results.append(db.sql(SHORT).fetchall())) for _ in range(4)]
    for thread in threads:
        thread.start()
    expected = db.sql(SHORT).fetchall()
    for thread in threads:
        thread.join()
    assert results == [expected] * 4


def test_how_much_of_a_sum_is_gathered() -> None:
    work = Work()
    assert work.gathered is None
    with work.gathering(total=200, done=100) as gathering:
        assert work.gathered == 0.5
        gathering.add(50)
        assert work.gathered == 0.75
        with work.stopped(), pytest.raises(InterruptedError):
            gathering.add(50)
    assert work.gathered is None


BAR = """
import signal, sys, threading, metaql, metaql.progress
metaql.progress.PATIENCE = 0.5
signal.signal(signal.SIGINT, signal.default_int_handler)
with metaql.connect(sys.argv[1]) as db:
    db.sql("SELECT 1").fetchall()
    threading.Timer(2, signal.raise_signal, [signal.SIGINT]).start()
    try:
        db.sql(sys.argv[2]).fetchall()
    except KeyboardInterrupt:
        print("stopped")
"""


def test_a_bar_in_a_terminal_only(small_store: Path) -> None:
    command = [sys.executable, "-c", BAR, str(small_store), FOREVER.replace("1000000000", "10000000")]
    outer, inner = pty.openpty()
    termios.tcsetwinsize(inner, (24, 80))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as in_pipe:
        in_terminal = subprocess.run(command, stdout=subprocess.PIPE, stderr=inner, text=True, check=True)
        out, err = in_pipe.communicate()
    assert in_terminal.stdout == out == "stopped\n"
    shown = os.read(outer, 1 << 16).decode()
    os.close(inner)
    os.close(outer)
    assert re.search(r"query:\s+\d+%", shown)
    assert err == ""


def test_a_relation_after_its_connection_is_closed(small_store: Path) -> None:
    with metaql.connect(small_store) as db:
        relation = db.sql(SHORT)
    for look in (relation.fetchall, relation.to_arrow_table, relation.show):
        with pytest.raises(duckdb.Error, match="closed"):
            look()


def test_a_query_that_needs_more_memory_than_duckdb_may_have(db: Connection) -> None:
    db.sql("SET memory_limit = '20 MB'")
    db.sql("SET max_temp_directory_size = '0 MB'")
    with pytest.raises(duckdb.OutOfMemoryException):
        db.sql(
            "SELECT list(inner_product(t.gradient, v.gradient)) FROM train t, validation v, range(1000000)"
        ).fetchall()
    assert db.sql(SHORT).fetchall() == [(40, True)]


def test_a_reader_that_is_dropped_halfway(db: Connection) -> None:
    rows = "SELECT r.range, inner_product(t.gradient, v.gradient) FROM train t, validation v, range(100000) r"
    reader = db.sql(rows).to_arrow_reader(1000)
    assert reader.read_next_batch().num_rows > 0
    del reader
    assert db.sql(SHORT).fetchall() == [(40, True)]
    assert sum(batch.num_rows for batch in db.sql(rows).to_arrow_reader(10_000)) == 40 * 100_000
