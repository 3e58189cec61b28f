"""A connection behaves as a DuckDB connection does, with a store's relations in it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch

import metaql
from metaql.connection import Connection
from metaql.errors import NotAStoreError, QueryError, UnknownNameError
from metaql.planner import Plan
from metaql.storage.blocks import Block, Full
from metaql.storage.writer import Writer
from metaql.udfs.models import Model
from metaql.udfs.register import session_of
from metaql.udfs.sources import StoreSource

P2B = """
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS influence
FROM train t, validation v GROUP BY ALL ORDER BY sample_id
"""
Record = Callable[..., Path]


@pytest.fixture
def db(small_store: Path) -> Iterator[Connection]:
    with metaql.connect(small_store) as connection:
        yield connection


def p2b(gradients: np.ndarray) -> np.ndarray:
    """From the laid-out gradients: the second checkpoint's rows follow the first's 15."""
    train, validation = gradients[15:23], gradients[23:28]
    return (train @ validation.T).mean(1)


def test_every_way_to_look_at_a_result(db: Connection, small_gradients: np.ndarray, capfd: Any) -> None:
    relation, expected = db.sql(P2B), p2b(small_gradients)
    assert relation.columns == ["sample_id", "influence"]
    rows = relation.fetchall()
    assert [sample for sample, _ in rows] == list(range(8))
    np.testing.assert_allclose([score for _, score in rows], expected, rtol=1e-6)
    for frame in (relation.df(), relation.pl(), relation.to_arrow_table()):
        np.testing.assert_allclose(np.asarray(frame["influence"]), expected, rtol=1e-6)
    relation.show()
    assert "influence" in capfd.readouterr().out
    assert relation.filter("sample_id < 3").order("influence").limit(2).aggregate("count(*)").fetchall() == [(2,)]


def test_a_relation_runs_again_after_other_queries_and_commits(record_small_store: Record, tmp_path: Path) -> None:
    path = record_small_store(tmp_path / "store")
    with metaql.connect(path) as db:
        relation = db.sql(P2B)
        before = relation.fetchall()
        db.sql("SELECT avg(gradient) FROM train").fetchall()
        with Writer.open(path) as writer:
            writer.add_checkpoint({"w": torch.ones(1)}, "later", 99, {})
        assert relation.fetchall() == before
        assert db.sql("SELECT count(*) FROM checkpoints").fetchall() == [(2,)]
    with metaql.connect(path) as db:
        assert db.sql("SELECT count(*) FROM checkpoints").fetchall() == [(3,)]


def test_vectors_survive_their_cache(db: Connection, small_gradients: np.ndarray) -> None:
    relation = db.sql("SELECT norm(avg(gradient)) FROM train")
    before = relation.fetchall()
    session = session_of(db._executor._connection)  # type: ignore[union-attr]
    session.vectors._cache._capacity = 0
    session.vectors._cache._entries.clear()
    assert relation.fetchall() == before
    np.testing.assert_allclose(before[0][0], np.linalg.norm(small_gradients[15:23].mean(0)), rtol=1e-6)


def test_parameters(db: Connection, small_gradients: np.ndarray) -> None:
    query = P2B.replace("GROUP BY", "WHERE v.sample_id < {} AND t.sample_id <> {} GROUP BY")
    kept = small_gradients[15:23] @ small_gradients[23:26].mean(0)
    expected = [score for sample, score in enumerate(kept) if sample != 5]
    for text, params in (
        (query.format("?", "?"), [3, 5]),
        (query.format("$2", "$1"), (5, 3)),
        (query.format("$few", "$not"), {"few": 3, "not": 5}),
    ):
        rows = db.sql(text, params=params).fetchall()
        np.testing.assert_allclose([score for _, score in rows], expected, rtol=1e-6)
    assert db.sql("SELECT ? + 1", [41]).fetchall() == [(42,)]


def test_the_users_own_tables_and_frames(db: Connection) -> None:
    weights = pd.DataFrame({"sample_id": range(8), "w": np.ones(8)})
    more = pl.DataFrame({"sample_id": [0, 1]})
    third = pa.table({"sample_id": [7]})
    assert db.sql("SELECT sum(w) FROM train JOIN weights USING (sample_id)").fetchall() == [(8.0,)]
    weighted = "SELECT norm(sum(w * gradient)) > 0 FROM train JOIN weights USING (sample_id)"
    assert db.sql(weighted).fetchall() == [(True,)]
    assert db.sql("SELECT count(*) FROM more, third").fetchall() == [(2,)]
    db.register("mine", weights)
    assert db.sql("SELECT count(*) FROM mine").fetchall() == [(8,)]
    db.sql("CREATE TABLE kept AS SELECT sample_id, gradient FROM train WHERE label = 1")
    db.sql("INSERT INTO kept SELECT sample_id, avg(gradient) FROM validation GROUP BY sample_id")
    assert db.sql("SELECT count(norm(gradient)) FROM kept").fetchall() == [(8,)]
    del more, third


def test_a_name_like_one_of_ours_is_not_in_the_way(db: Connection) -> None:
    query = pd.DataFrame({"x": [1]})
    text = pd.DataFrame({"x": [2]})
    assert db.sql("SELECT query.x + text.x FROM query, text").fetchall() == [(3,)]
    del query, text


def test_temporary_tables_settings_and_transactions(db: Connection) -> None:
    db.sql("CREATE TEMP TABLE small AS SELECT sample_id FROM train WHERE label = 1")
    assert db.sql("SELECT count(*) FROM small").fetchall() == [(3,)]
    assert db.sql("SELECT count(norm(gradient)) FROM small JOIN train USING (sample_id)").fetchall() == [(3,)]
    db.sql("SET VARIABLE k = 2")
    assert db.sql("SELECT getvariable('k')").fetchall() == [(2,)]
    db.sql("BEGIN")
    db.sql("CREATE TABLE gone AS SELECT 1")
    db.sql("ROLLBACK")
    with pytest.raises(duckdb.CatalogException):
        db.sql("SELECT * FROM gone")


def test_comments_and_updates_change_nothing_about_cursors(db: Connection) -> None:
    assert db._executor is not None
    db.sql("CREATE TABLE mine AS SELECT sample_id FROM train")
    db.sql("UPDATE mine SET sample_id = 1")
    assert db.sql("-- set\n/* use */ SELECT count(*) FROM mine").fetchall() == [(8,)]
    assert not db._executor._has_own_state


def test_a_second_query_while_the_first_is_half_read(db: Connection) -> None:
    reader = db.sql("SELECT inner_product(t.gradient, t.gradient) FROM train t, range(10000)").to_arrow_reader(100)
    reader.read_next_batch()
    assert len(db.sql(P2B).fetchall()) == 8
    assert reader.read_next_batch().num_rows > 0


def test_threads_share_a_connection(db: Connection) -> None:
    expected, found = db.sql(P2B).fetchall(), []
    before = torch.get_num_threads()

    def work() -> None:
        for _ in range(5):
            found.append(db.sql(P2B).fetchall())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 20
    assert torch.get_num_threads() == before


def test_after_close(small_store: Path) -> None:
    db = metaql.connect(small_store)
    relation = db.sql(P2B)
    db.close()
    db.close()
    with pytest.raises(QueryError, match=r"is closed: call metaql\.connect again"):
        db.sql("SELECT 1")
    with pytest.raises(QueryError, match="is closed"):
        db.register("x", pa.table({"a": [1]}))
    with pytest.raises(duckdb.ConnectionException):
        relation.fetchall()


def test_closing_lets_go_of_the_session(small_store: Path) -> None:
    with metaql.connect(small_store) as db:
        session = weakref.ref(session_of(db._executor._connection))  # type: ignore[union-attr]
        assert session() is not None
    gc.collect()
    assert session() is None


def test_the_users_database_file_gets_nothing_of_ours(small_store: Path, tmp_path: Path) -> None:
    file = tmp_path / "metaql.duckdb"
    with metaql.connect(small_store, database=file) as db:
        db.sql("CREATE TABLE scores AS " + P2B)
        db.sql("CREATE TABLE train AS SELECT 1 AS mine")
        assert db.sql("SELECT * FROM train").fetchall() == [(1,)]
    with duckdb.connect(str(file)) as plain:
        tables = plain.sql("SELECT table_name FROM duckdb_tables() ORDER BY 1").fetchall()
        assert tables == [("scores",), ("train",)]
        assert plain.sql("SELECT count(*) FROM duckdb_views() WHERE NOT internal").fetchall() == [(0,)]
        assert plain.sql("SELECT count(*) FROM scores").fetchall() == [(8,)]
    with metaql.connect(small_store, database=file) as db:
        assert db.sql("SELECT count(*) FROM scores JOIN validation USING (sample_id)").fetchall() == [(5,)]


def test_load_into_a_connection(small_store: Path, record_small_store: Record, tmp_path: Path) -> None:
    with duckdb.connect() as plain:
        metaql.load(plain, small_store)
        metaql.load(plain.cursor(), small_store, schema="again")
        query = "SELECT inner_product(a.gradient, b.gradient) FROM metaql.train a JOIN again.train b USING (sample_id)"
        assert plain.sql(query).fetchall() == plain.sql(query.replace("again", "metaql")).fetchall()
        with pytest.raises(QueryError, match="pass another schema="):
            metaql.load(plain, small_store)
        plain.sql("CREATE SCHEMA taken")
        with pytest.raises(QueryError, match="'taken'"):
            metaql.load(plain, small_store, schema="taken")


def test_float64(record_small_store: Record, tmp_path: Path) -> None:
    path = record_small_store(tmp_path / "double", dtype="float64")
    with duckdb.connect() as plain:
        metaql.load(plain, record_small_store(tmp_path / "single"), schema="single")
        assert str(plain.sql("SELECT restore(gradient, 'fc1') AS r FROM single.train").types[0]) == "FLOAT[]"
        metaql.load(plain, path, schema="double")
        assert str(plain.sql("SELECT restore(gradient, 'fc1') AS r FROM single.train").types[0]) == "DOUBLE[]"
        pairs = "SELECT inner_product(a.gradient, b.gradient) FROM {}.train a, {}.train b ORDER BY ALL"
        expected = plain.sql(pairs.format("double", "double")).fetchall()
        assert plain.sql(pairs.format("single", "double")).fetchall() == expected


def test_bfloat16(record_small_store: Record, tmp_path: Path, small_gradients: np.ndarray) -> None:
    with metaql.connect(record_small_store(tmp_path / "half", dtype="bfloat16")) as db:
        rows = db.sql(P2B).fetchall()
    np.testing.assert_allclose([score for _, score in rows], p2b(small_gradients), rtol=1e-6)


def test_splits_at_different_checkpoints(
    record_small_store: Record, record_one_split: Callable[..., None], tmp_path: Path
) -> None:
    path, rng = record_small_store(tmp_path / "store", checkpoints=1), np.random.default_rng(1)
    with Writer.open(path) as writer:
        number = writer.add_checkpoint({"w": torch.ones(1)}, "second", 1, {})
        record_one_split(writer, rng, "train", number, 3)
    with pytest.warns(UserWarning, match="train at 2, validation at 1") as caught:
        db = metaql.connect(path)
    assert caught[0].filename == __file__
    with db:
        assert db.sql("SELECT count(*), count(gradient) FROM train").fetchall() == [(3, 3)]
        assert db.sql("SELECT count(*) FROM samples WHERE split = 'train'").fetchall() == [(8,)]


def test_a_trajectory_and_odd_names(
    record_small_store: Record, record_one_split: Callable[..., None], tmp_path: Path
) -> None:
    path, rng = record_small_store(tmp_path / "store", checkpoints=1), np.random.default_rng(1)
    with Writer.open(path) as writer:
        record_one_split(writer, rng, "online", None, 3)
        record_one_split(writer, rng, 'it\'s "odd"', 1, 2)
        record_one_split(writer, rng, "Layers", 1, 2)
    with pytest.warns(UserWarning, match="'Layers' has the name of a relation"):
        db = metaql.connect(path)
    with db:
        assert db.sql("SELECT count(*), count(gradient), count(loss) FROM online").fetchall() == [(3, 0, 0)]
        steps = db.sql("SELECT step, norm(gradient) > 0 FROM gradients WHERE checkpoint IS NULL").fetchall()
        assert steps == [(0, True)] * 3
        assert db.sql('SELECT count(gradient) FROM "it\'s ""odd"""').fetchall() == [(2,)]
        assert db.sql("SELECT count(*) FROM gradients WHERE split = 'Layers'").fetchall() == [(2,)]


def test_gradients_under_another_name_are_planned_too(db: Connection) -> None:
    db.sql("CREATE VIEW renamed AS SELECT sample_id, gradient AS g FROM train")
    assert db.sql("SELECT norm(avg(g)) > 0 FROM renamed").fetchall() == [(True,)]
    # Nothing in this text looks like a gradient.
    assert len(db.sql("SELECT avg(g) FROM renamed").fetchall()) == 1


def test_text_without_gradients_is_not_touched(db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("planned")

    monkeypatch.setattr("metaql.planner.plan", refuse)
    assert db.sql("SELECT avg(loss) > 0, 0xFF FROM train").fetchall() == [(True, 0)]
    with pytest.raises(duckdb.BinderException, match="Referenced column"):
        db.sql("SELECT avg(nothing) FROM train")


def test_explain_and_writing_statements(db: Connection, tmp_path: Path) -> None:
    assert "Score ⟨t.gradient, avg(v.gradient)⟩" in str(db.sql("EXPLAIN " + P2B).fetchall())
    assert "Result: 8 rows" in str(db.sql("EXPLAIN ANALYZE " + P2B).fetchall())
    file = tmp_path / "scores.parquet"
    db.sql(f"COPY ({P2B}) TO '{file}'")
    assert db.sql(f"SELECT count(influence) FROM '{file}'").fetchall() == [(8,)]
    db.sql("CREATE TABLE g AS SELECT avg(gradient) AS g FROM train")
    assert db.sql("SELECT count(norm(g)) FROM g").fetchall() == [(1,)]


def test_errors_of_our_own(db: Connection, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match=r"pattern 'fc9'. Recorded are: fc1.weight, fc1.bias"):
        db.sql("SELECT norm(layers(gradient, 'fc9')) FROM train")
    with pytest.raises(NotAStoreError):
        metaql.connect(tmp_path / "nothing")
    with pytest.raises(QueryError, match="pass it as model="):
        raise_from_duckdb(db, "SELECT norm(gradient([1.0], 0))")


def raise_from_duckdb(db: Connection, query: str) -> None:
    """DuckDB wraps what a function raises, and keeps the message."""
    try:
        db.sql(query).fetchall()
    except duckdb.InvalidInputException as error:
        raise QueryError(str(error)) from None


class Twice:
    """A replay whose gradient is the input's sum, times the target plus one, in every place."""

    def __init__(self, layers: Any) -> None:
        self.layers, self.calls = layers, 0

    def gradient(self, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, Block]:
        self.calls += 1
        value = float(inputs.sum()) * float(targets[0] + 1)
        return {layer.name: Full(torch.full((len(inputs), layer.width), value)) for layer in self.layers}


def test_replayed_gradients(db: Connection, small_gradients: np.ndarray) -> None:
    session = session_of(db._executor._connection)  # type: ignore[union-attr]
    source = next(iter(session._stores.values()))[0]
    assert isinstance(source, StoreSource)
    replay = Twice(source.space.layers)
    session.add_model(Model(replay, source))
    rows = db.sql("SELECT inner_product(gradient, gradient([0.5, 1], 2)) FROM train ORDER BY sample_id").fetchall()
    np.testing.assert_allclose([score for (score,) in rows], 4.5 * small_gradients[15:23].sum(1), rtol=1e-6)
    assert replay.calls == 1
    nulls = "SELECT gradient(NULL, 1), gradient([1, NULL], 1), gradient([1, 2], NULL)"
    assert db.sql(nulls).fetchall() == [(None, None, None)]
    width = small_gradients.shape[1]
    mixed = "SELECT norm(avg(g)) FROM (SELECT gradient([1], 0) AS g UNION ALL SELECT gradient([3], 0))"
    assert db.sql(mixed).fetchall()[0][0] == pytest.approx(2 * np.sqrt(width))


def test_a_device_by_name(small_store: Path, small_gradients: np.ndarray) -> None:
    with metaql.connect(small_store, device="cpu") as db:
        scores = [score for _, score in db.sql(P2B).fetchall()]
    np.testing.assert_allclose(scores, p2b(small_gradients), rtol=1e-6)


def test_nothing_is_warned_of(small_store: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with metaql.connect(small_store) as db:
            db.sql(P2B).fetchall()


def test_a_plan_is_made_anew_when_a_relation_has_changed(db: Connection) -> None:
    db.sql("CREATE TABLE mine AS SELECT sample_id, loss AS gradient FROM train")
    query = "SELECT avg(gradient) IS NULL, typeof(avg(gradient)) = 'DOUBLE' FROM mine"
    assert db.sql(query).fetchall() == [(False, True)]
    db.sql("CREATE OR REPLACE TABLE mine AS SELECT sample_id, gradient FROM train")
    assert db.sql(query).fetchall() == [(False, False)]
    db.sql("CREATE OR REPLACE TABLE mine AS SELECT sample_id, 1 AS gradient FROM train")
    assert db.sql(query).fetchall() == [(False, True)]


@pytest.mark.parametrize("broken", ["planner", "plan"])
def test_a_bug_of_the_planner_costs_time_only(broken: str, db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = sorted(db.sql(P2B).fetchall())

    def plan(text: str, catalogue: object) -> Plan:
        if broken == "planner":
            raise AttributeError("no such thing")
        return Plan("SELECT nothing FROM train")

    monkeypatch.setattr(db._plans, "plan", plan)
    with pytest.warns(UserWarning, match="bug of ours"):
        found = db.sql(P2B)
    assert [sample for sample, _ in sorted(found.fetchall())] == [sample for sample, _ in expected]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(duckdb.BinderException, match='"nowhere"'):
            db.sql("SELECT avg(inner_product(t.gradient, v.nowhere)) FROM train t, validation v")


def test_queries_that_take_minutes_are_warned_of(db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaql.connection.FEWEST_PAIRS", 0)
    monkeypatch.setattr("metaql.explain.MINUTES", 1e-6)
    slow = "SELECT t.sample_id, max(inner_product(t.gradient, v.gradient)) FROM train t, validation v GROUP BY ALL"
    with pytest.warns(UserWarning, match=r"about 40 pairs of gradients.*minutes: max over pairs is not linear"):
        db.sql(slow)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        db.sql(slow)
        db.sql("EXPLAIN " + slow.lower())


@pytest.mark.parametrize("ending", ["del db; gc.collect(); relation.fetchall()", "del db, relation", "db.close()", ""])
def test_a_relation_outlives_its_connection_and_nothing_complains_at_exit(ending: str, small_store: Path) -> None:
    code = f"""
import gc, metaql
db = metaql.connect({str(small_store)!r})
relation = db.sql("SELECT norm(gradient) FROM train")
relation.fetchall()
{ending}
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert (done.returncode, done.stderr) == (0, "")
