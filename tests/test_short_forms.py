"""What files of SQL can't say of the short forms: parameters, local tables, kinds of errors, lifetimes, plans."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pytest

import metaql
from metaql.connection import Connection
from metaql.errors import QueryError, UnknownNameError
from metaql.udfs.register import TABLE_FUNCTIONS
from metaql.udfs.table_functions import TableFunction

P2B = (
    "SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM {0}train t, {0}validation v"
    " WHERE {1} GROUP BY t.sample_id"
)


@pytest.fixture
def db(small_store: Path) -> Iterator[Connection]:
    with metaql.connect(small_store) as opened:
        yield opened


@pytest.fixture
def con(small_store: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        metaql.load(opened, small_store, schema="a")
        yield opened


def expanded(db: Connection, query: str) -> str:
    return db._planned(query, sys._getframe())


def returned(con: duckdb.DuckDBPyConnection, query: str) -> str:
    """What DuckDB runs in place of p2b with this query side."""
    row = con.execute("SELECT metaql_p2b('a', ['train', 'validation'], '', 'train', ?, '*', NULL)", [query]).fetchone()
    assert row is not None
    return str(row[0])


# Those that follow a training run need one; see tests/methods.
@pytest.mark.parametrize("operator", TABLE_FUNCTIONS[:4], ids=lambda operator: operator.name)
def test_columns_are_those_declared(db: Connection, con: duckdb.DuckDBPyConnection, operator: TableFunction) -> None:
    assert tuple(db.sql(f"FROM {operator.name}()").columns) == operator.columns
    assert tuple(con.sql(f"FROM a.{operator.name}()").columns) == operator.columns


@pytest.mark.parametrize("parameters", [["validation", "fc1"], {"q": "validation", "l": "fc1"}])
def test_arguments_may_be_parameters(
    db: Connection, con: duckdb.DuckDBPyConnection, parameters: list[str] | dict[str, str]
) -> None:
    q, layers = ("?", "?") if isinstance(parameters, list) else ("$q", "$l")
    expected = dict(db.sql("FROM p2b(layers := 'fc1')").fetchall())
    for opened, prefix in ((db, ""), (con, "a.")):
        text = f"FROM {prefix}p2b(query := {q}, layers := {layers})"
        assert dict(opened.sql(text, params=parameters).fetchall()) == pytest.approx(expected)


def test_parameters_stand_beside_short_forms(db: Connection) -> None:
    rows = db.sql("SELECT sample_id FROM p2b() WHERE sample_id > ? ORDER BY ? * sample_id", params=[5, -1]).fetchall()
    assert rows == [(7,), (6,)]


def test_local_tables_are_sides(db: Connection, con: duckdb.DuckDBPyConnection) -> None:
    for opened, prefix in ((db, ""), (con, "a.")):
        chosen = opened.sql(f"FROM {prefix}validation WHERE label = 2").to_arrow_table()
        found = dict(opened.sql(f"FROM {prefix}p2b(query := 'chosen')").fetchall())
        assert found == pytest.approx(dict(opened.sql(P2B.format(prefix, "v.label = 2")).fetchall()))
        assert len(chosen) == 1


def test_a_relation_follows_what_it_was_made_of(db: Connection, con: duckdb.DuckDBPyConnection) -> None:
    for opened, prefix in ((db, ""), (con, "a.")):
        opened.sql(f"CREATE TABLE chosen AS FROM {prefix}validation WHERE label = 2")
        scores = opened.sql(f"FROM {prefix}p2b(query := 'chosen')")
        assert dict(scores.fetchall()) == pytest.approx(dict(opened.sql(P2B.format(prefix, "v.label = 2")).fetchall()))
        opened.sql(f"INSERT INTO chosen FROM {prefix}validation WHERE label = 1")
        assert dict(scores.fetchall()) == pytest.approx(dict(opened.sql(P2B.format(prefix, "v.label > 0")).fetchall()))


def test_calls_with_constants_are_planned_in_their_place(db: Connection) -> None:
    text = expanded(db, "EXPLAIN SELECT x.i FROM P2B(layers => 'fc1') AS x(i, j)")
    assert text.startswith("EXPLAIN ")
    assert "metaql_mean" in text
    assert "p2b" not in text.lower()
    assert "AS x(i, j)" in text


@pytest.mark.parametrize(
    "query",
    [
        "FROM p2b(query := $1)",
        "FROM p2b(query := 'valid' || 'ation')",
        "FROM p2b(query := 'nothing')",
        "FROM p2b(mistyped := 'validation')",
        "FROM other.p2b()",
        "FROM p2b() TABLESAMPLE 10 ROWS",
        "FROM p2b",
        "CREATE VIEW scores AS FROM p2b()",
    ],
)
def test_other_calls_are_left_to_duckdb(db: Connection, query: str) -> None:
    assert expanded(db, query) == query


def test_calls_are_left_to_duckdb_where_names_may_mean_something_else(db: Connection) -> None:
    db.sql("CREATE SCHEMA other")
    db.sql("CREATE MACRO other.p2b() AS TABLE SELECT 1 AS mine")
    assert db.sql("FROM p2b()").columns == ["sample_id", "influence"]
    db.sql("USE memory.other")
    assert db.sql("FROM p2b()").columns == ["mine"]
    assert db.sql("FROM metaql.p2b(train := 'metaql.train', query := 'metaql.validation')").fetchall()


def test_what_macros_return_is_planned_where_it_can_be(con: duckdb.DuckDBPyConnection) -> None:
    con.execute("CREATE TEMPORARY TABLE unseen AS FROM a.validation")
    assert "metaql_mean" in returned(con, "validation")
    assert "metaql_mean" in returned(con, "FROM validation WHERE label = 1")
    assert returned(con, "unseen") == (
        "SELECT train.sample_id, avg(inner_product(train.gradient, query.gradient)) AS influence"
        ' FROM "a".main."train" AS train, "unseen" AS query GROUP BY train.sample_id'
    )


def test_errors_are_ours_in_our_connection_and_duckdb_s_in_others(
    db: Connection, con: duckdb.DuckDBPyConnection
) -> None:
    with pytest.raises(UnknownNameError, match=r"pattern 'nope'. Recorded are: fc1\.weight"):
        db.sql("FROM p2b(layers := 'nope')")
    with pytest.raises(QueryError, match="one SELECT and nothing else"):
        db.sql("FROM p2b('COMMIT; COMMIT')")
    with pytest.raises(duckdb.InvalidInputException, match=r"UnknownNameError: .* at checkpoint 7, but at 1, 2"):
        con.sql("FROM a.p2b(checkpoint := 7)")


def test_threads_share_short_forms(db: Connection, con: duckdb.DuckDBPyConnection) -> None:
    expected = dict(db.sql("FROM p2b()").fetchall())

    def ask(_: int) -> dict[int, float]:
        with con.cursor() as cursor:
            return dict(cursor.execute("FROM a.p2b()").fetchall())

    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(ask, range(16)):
            assert found == pytest.approx(expected)


def test_planning_keeps_no_connection_open(small_store: Path) -> None:
    connection = duckdb.connect()
    metaql.load(connection, small_store, schema="a")
    connection.sql("FROM a.p2b()").fetchall()
    alive = weakref.ref(connection)
    connection.close()
    del connection
    gc.collect()
    assert alive() is None
