"""What a connection remembers of earlier queries never shows: the same text means what its names mean now."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import numpy as np
import pytest

import metaql
from metaql.connection import Connection
from metaql.storage.writer import Writer

MEANS = (
    "SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY 1 ORDER BY 1"
)
PAIRS = "SELECT t.sample_id, v.sample_id, inner_product(t.gradient, v.gradient) FROM train t, validation v ORDER BY ALL"
FEW = "SELECT * FROM metaql.validation WHERE sample_id < 2"


@pytest.fixture
def db(small_store: Path) -> Iterator[Connection]:
    with metaql.connect(small_store) as connection:
        yield connection


def require_means(db: Connection, gradients: np.ndarray, few: bool) -> None:
    """Of the query above: with the validation samples of the store, or the first two of them."""
    train, validation = gradients[15:23], gradients[23:25] if few else gradients[23:28]
    found = [score for _, score in db.sql(MEANS).fetchall()]
    np.testing.assert_allclose(found, (train @ validation.T).mean(1), rtol=1e-6)
    assert len(db.sql(PAIRS).fetchall()) == 8 * len(validation)


@pytest.mark.parametrize(
    "made, dropped",
    [
        (f"CREATE TABLE validation AS {FEW}", "DROP TABLE validation"),
        (f"CREATE TEMP TABLE validation AS {FEW}", "DROP TABLE validation"),
        (f"CREATE VIEW validation AS {FEW}", "DROP VIEW validation"),
        (f"BEGIN; CREATE TABLE validation AS {FEW}", "ROLLBACK"),
        (f"BEGIN; CREATE VIEW validation AS {FEW}", "ROLLBACK"),
        (
            f"CREATE SCHEMA mine; CREATE TABLE mine.validation AS {FEW}; SET search_path = 'mine,metaql.main'",
            "SET search_path = 'memory.main,metaql.main'",
        ),
    ],
)
def test_relations_that_come_and_go(made: str, dropped: str, db: Connection, small_gradients: np.ndarray) -> None:
    require_means(db, small_gradients, few=False)
    for _ in range(2):
        db.sql(
            made.replace("CREATE SCHEMA", "CREATE SCHEMA IF NOT EXISTS").replace("TABLE mine", "OR REPLACE TABLE mine")
        )
        require_means(db, small_gradients, few=True)
        db.sql(dropped)
        require_means(db, small_gradients, few=False)


@pytest.mark.parametrize("kind", ["TABLE", "TEMP TABLE", "VIEW", "TEMP VIEW"])
def test_relations_that_are_replaced(kind: str, db: Connection, small_gradients: np.ndarray) -> None:
    for few in (False, True, False):
        db.sql(f"CREATE OR REPLACE {kind} validation AS {FEW if few else 'SELECT * FROM metaql.validation'}")
        require_means(db, small_gradients, few)


def test_tables_that_are_registered(db: Connection, small_gradients: np.ndarray) -> None:
    require_means(db, small_gradients, few=False)
    table = db.sql(FEW).to_arrow_table()
    db.register("validation", table)
    require_means(db, small_gradients, few=True)
    db.register("validation", table.slice(0, 0))
    assert db.sql(MEANS).fetchall() == db.sql(PAIRS).fetchall() == []


def test_rows_that_are_added_and_deleted(db: Connection, small_gradients: np.ndarray) -> None:
    db.sql(f"CREATE TABLE validation AS {FEW}")
    require_means(db, small_gradients, few=True)
    db.sql("INSERT INTO validation SELECT * FROM metaql.validation WHERE sample_id >= 2")
    require_means(db, small_gradients, few=False)
    db.sql("DELETE FROM validation WHERE sample_id >= 2")
    require_means(db, small_gradients, few=True)


def test_settings_and_parameters(db: Connection, small_gradients: np.ndarray) -> None:
    text = MEANS.replace("GROUP BY", "WHERE v.sample_id < ? GROUP BY")
    train, validation = small_gradients[15:23], small_gradients[23:28]
    for threads, count in ((1, 5), (2, 1), (2, 3), (1, 5)):
        db.sql(f"SET threads = {threads}")
        expected = (train @ validation[:count].T).mean(1)
        for found in (db.sql(text, [count]), db.sql(text.replace("?", str(count)))):
            np.testing.assert_allclose([score for _, score in found.fetchall()], expected, rtol=1e-6)


@pytest.mark.parametrize("before", ["", MEANS])
def test_functions_of_the_user_go_before_those_of_the_same_name(before: str, db: Connection) -> None:
    if before:
        db.sql(before).fetchall()
    query = """
    SELECT t.sample_id, norm(v.sample_id), avg(inner_product(t.gradient, v.gradient))
    FROM train t, validation v GROUP BY 1
    """
    db.sql("CREATE MACRO norm(x) AS max(x)")
    assert {highest for _, highest, _ in db.sql(query).fetchall()} == {4}
    db.sql("CREATE OR REPLACE MACRO norm(x) AS min(x)")
    assert {lowest for _, lowest, _ in db.sql(query).fetchall()} == {0}
    db.sql("DROP MACRO norm")
    with pytest.raises(duckdb.BinderException, match="norm"):
        db.sql(query)


def test_a_store_that_grows(
    record_small_store: Callable[..., Path],
    record_one_split: Callable[..., None],
    tmp_path: Path,
) -> None:
    path = record_small_store(tmp_path / "store")
    query = "SELECT count(*), count(norm(gradient)) FROM {}"
    with metaql.connect(path) as db:
        assert db.sql(query.format("validation")).fetchall() == [(5, 5)]
        with Writer.open(path) as writer:
            record_one_split(writer, np.random.default_rng(2), "later", 2, 3)
        # A connection stays with what there was when it was made.
        assert db.sql(query.format("validation")).fetchall() == [(5, 5)]
        with pytest.raises(duckdb.CatalogException):
            db.sql(query.format("later"))
    with metaql.connect(path) as db:
        assert db.sql(query.format("later")).fetchall() == [(3, 3)]


def test_splits_have_the_same_columns_however_they_were_recorded(
    record_small_store: Callable[..., Path], record_one_split: Callable[..., None], tmp_path: Path
) -> None:
    path = record_small_store(tmp_path / "store", checkpoints=1)
    with Writer.open(path) as writer:
        record_one_split(writer, np.random.default_rng(3), "online", None, 3)
    with metaql.connect(path) as db:
        found = {name: db.sql(f"SELECT * FROM {name}") for name in ("train", "validation", "online")}
        assert len({(tuple(one.columns), tuple(map(str, one.types))) for one in found.values()}) == 1
