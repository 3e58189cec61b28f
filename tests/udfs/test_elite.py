"""``elite``, ``anomaly_score`` and ``elite_candidates`` in SQL; what they compute is tested in ``tests/methods``."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest
import torch

import metaql
from metaql.connection import Connection
from metaql.errors import QueryError, UnknownNameError, WriteError
from metaql.methods import elite
from metaql.udfs import elite_fit
from metaql.udfs.register import session_of

ROWS = 60
WINDOWS = f"""CREATE TABLE windows AS SELECT i AS sample_id, now() AS recorded_at,
 [sin(i * 7 + x) + CASE WHEN i % 10 = 0 THEN 3 ELSE 0 END FOR x IN range(6)]::FLOAT[] AS features,
 sin(i) AS a, i % 7 AS b, i % 10 = 0 AS bad FROM range({ROWS}) t(i)"""
REVIEWED = (
    "CREATE TABLE reviewed AS SELECT * EXCLUDE (recorded_at), bad AS is_anomaly FROM windows WHERE sample_id < 12"
)
DATA = "(SELECT sample_id, features FROM windows)"
LABELLED = "labelled := (SELECT sample_id, features, is_anomaly FROM reviewed)"
CALL = f"elite({DATA}, {LABELLED}, epochs := 2)"


@pytest.fixture
def store(small_store: Path, tmp_path: Path) -> Path:
    """A store of the test's own, to save models in."""
    return Path(shutil.copytree(small_store, tmp_path / "store"))


@pytest.fixture
def db(store: Path) -> Iterator[Connection]:
    with metaql.connect(store) as opened:
        opened.sql(WINDOWS)
        opened.sql(REVIEWED)
        yield opened


@pytest.fixture
def con(store: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as opened:
        metaql.load(opened, store, schema="a")
        opened.sql(WINDOWS)
        opened.sql(REVIEWED)
        yield opened


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[elite.Settings]:
    """The settings of every training that runs."""
    found: list[elite.Settings] = []

    def counted(*arguments: Any) -> elite.Fitted:
        found.append(arguments[3])
        return elite.fit(*arguments)

    monkeypatch.setattr(elite_fit, "fit", counted)
    return found


def tensors(con: Any, table: str) -> torch.Tensor:
    return torch.tensor([row[0] for row in con.sql(f"SELECT features FROM {table} ORDER BY sample_id").fetchall()])


def test_what_the_method_finds_is_in_the_rows(db: Connection) -> None:
    found = db.sql(f"FROM {CALL}")
    assert found.columns == ["sample_id", "anomaly_score", "pseudo_label", "meta_gradient", "weight"]
    assert list(map(str, found.types)) == ["BIGINT", "FLOAT", "BOOLEAN", "FLOAT", "FLOAT"]
    rows = sorted(found.fetchall())
    labels = torch.tensor([row[0] for row in db.sql("SELECT is_anomaly FROM reviewed ORDER BY sample_id").fetchall()])
    # The order of the labelled rows is not the one of SQL, and moves sums by roundings.
    fitted = elite.fit(tensors(db, "windows"), tensors(db, "reviewed"), labels, elite.Settings(epochs=2))
    for place, name in enumerate(("anomaly_score", "pseudo_label", "meta_gradient", "weight"), start=1):
        values = np.array([row[place] for row in rows], dtype=np.float64)
        np.testing.assert_allclose(values, getattr(fitted, name).double().numpy(), rtol=1e-3, atol=1e-5, err_msg=name)
    assert [row[0] for row in rows] == list(range(ROWS))


def test_without_labels_there_are_scores_only(db: Connection) -> None:
    expected = sorted(db.sql(f"FROM elite({DATA}, epochs := 2)").fetchall())
    assert all(row[1] > 0 and row[2:] == (None, None, None) for row in expected)
    for labelled in ("NULL", "(FROM reviewed WHERE false)", "(SELECT * REPLACE (NULL AS is_anomaly) FROM reviewed)"):
        found = db.sql(f"FROM elite({DATA}, {labelled.replace('*', '* EXCLUDE (a, b, bad)')}, epochs := 2)")
        if labelled == "NULL":
            assert sorted(found.fetchall()) == expected
    kept = "(SELECT sample_id, features, NULL AS is_anomaly FROM reviewed)"
    assert sorted(db.sql(f"FROM elite({DATA}, {kept}, epochs := 2)").fetchall()) == expected


def test_a_relation_that_is_looked_at_twice_trains_once(db: Connection, fits: list[elite.Settings]) -> None:
    relation = db.sql(f"FROM {CALL}")
    first = relation.fetchall()
    assert relation.fetchall() == first
    assert relation.order("anomaly_score").limit(3).fetchall()
    assert db.sql(f"SELECT count(*) FROM {CALL} WHERE pseudo_label").fetchall()
    assert len(fits) == 1
    db.sql("UPDATE windows SET features = list_transform(features, lambda x: x + 1) WHERE sample_id = 3")
    assert relation.fetchall() != first
    db.sql(f"FROM {CALL.replace('epochs := 2', 'epochs := 2, seed := 1')}").fetchall()
    assert [one.seed for one in fits] == [0, 0, 1]


def test_a_detector_that_is_registered_anew_is_trained_anew(db: Connection) -> None:
    def register(factor: float) -> None:
        elite.register_detector(
            "of_this_test",
            lambda shape: torch.nn.Linear(shape[0], 2),
            lambda module, rows: factor * module(rows).square().mean(1),
        )

    call = f"SELECT max(anomaly_score) FROM elite({DATA}, detector := 'of_this_test', epochs := 1)"
    register(1.0)
    before = db.sql(call).fetchall()
    register(1e6)
    assert db.sql(call).fetchall() > before


def test_the_order_of_rows_makes_no_difference(db: Connection) -> None:
    expected = sorted(db.sql(f"FROM {CALL}").fetchall())
    shuffled = CALL.replace("FROM windows)", "FROM windows ORDER BY hash(sample_id))")
    with_own = shuffled.replace("FROM reviewed)", "FROM reviewed ORDER BY sample_id DESC)")
    with metaql.connect(db._store.path) as other:
        other.sql(WINDOWS)
        other.sql(REVIEWED)
        assert sorted(other.sql(f"FROM {with_own}").fetchall()) == expected


def test_relations_in_every_form(db: Connection, fits: list[elite.Settings]) -> None:
    expected = sorted(db.sql(f"FROM {CALL}").fetchall())
    frame = db.sql("SELECT sample_id, features FROM windows").df()
    assert isinstance(frame, pd.DataFrame)
    db.sql(f"CREATE VIEW w AS {DATA}")
    db.sql("CREATE TEMP TABLE l AS SELECT sample_id, features, is_anomaly FROM reviewed")
    for call in (
        "elite(frame, l, epochs := 2)",
        "elite(w, labelled => l, epochs := 2)",
        "elite('w', 'SELECT * FROM l', epochs := 2)",
        "metaql.elite(memory.main.w, l, epochs := 1 + 1)",
    ):
        found = sorted(db.sql(f"FROM {call}").fetchall())
        # pandas has lists of float64, or none.
        assert [row[0] for row in found] == [row[0] for row in expected], call
        assert found[0][1] == pytest.approx(expected[0][1], rel=1e-4), call
    text = (
        "WITH c AS (FROM windows), d AS (SELECT sample_id, features FROM c) SELECT e.* FROM elite(d, l, epochs := $n) e"
    )
    assert sorted(db.sql(text, params={"n": 2}).fetchall()) == expected
    text = "FROM elite((SELECT sample_id, features FROM windows WHERE sample_id < ?), epochs := ?)"
    assert len(db.sql(text, params=[30, 1]).fetchall()) == 30
    db.sql(f"CREATE VIEW scores AS FROM {CALL}")
    db.sql(f"CREATE TABLE kept AS FROM {CALL}")
    assert sorted(db.sql("FROM scores").fetchall()) == sorted(db.sql("FROM kept").fetchall()) == expected
    # A result is the data of another.
    nested = f"elite((SELECT sample_id, anomaly_score, weight FROM {CALL}), epochs := 1)"
    assert len(db.sql(f"FROM {nested}").fetchall()) == ROWS


def test_several_statements_in_a_text(db: Connection) -> None:
    local = db.sql("SELECT sample_id, a FROM windows").df()
    text = f"CREATE TABLE t AS FROM {CALL}; FROM elite(local, epochs := 1); SELECT count(*) FROM {CALL} SEMI JOIN t;"
    text = text.replace("JOIN t", "JOIN t USING (sample_id)")
    assert len(local) == ROWS
    assert db.sql(text).fetchall() == [(ROWS,)]
    db.sql(f"FROM {saved('m')}; CREATE TABLE scored AS SELECT anomaly_score('m', features) FROM windows")
    assert db.sql("SELECT count(*) FROM scored").fetchall() == [(ROWS,)]
    with pytest.raises(duckdb.ParserException):
        db.sql(f"FROM {CALL}; FORM nothing")


def test_on_a_plain_connection(con: duckdb.DuckDBPyConnection, db: Connection) -> None:
    expected = sorted(db.sql(f"FROM {CALL}").fetchall())
    data, labelled = DATA[1:-1], "SELECT sample_id, features, is_anomaly FROM reviewed"
    assert sorted(con.sql(f"FROM a.elite('{data}', labelled := '{labelled}', epochs := 2)").fetchall()) == expected
    con.sql(f"CREATE VIEW w AS {DATA}; CREATE TEMP TABLE l AS {labelled}")
    assert sorted(con.execute("FROM a.elite('w', 'l', epochs := ?)", [2]).fetchall()) == expected
    con.sql("FROM a.elite('w', 'l', epochs := 1, save_as := 'plain')").fetchall()
    assert con.sql("SELECT count(anomaly_score('plain', features)) FROM windows").fetchall() == [(ROWS,)]
    assert len(con.sql("FROM a.elite_candidates('plain', budget := 3)").fetchall()) == 3
    with pytest.raises(duckdb.InvalidInputException, match=r"QueryError: elite\(…\): epochs must be a whole number"):
        con.sql("FROM a.elite('w', epochs := 0)")


@pytest.mark.parametrize(
    "kind",
    [
        "BIGINT",
        "VARCHAR",
        "UUID",
        "HUGEINT",
        "DATE",
        "TIMESTAMPTZ",
        "DECIMAL(9, 2)",
        "ENUM ('x', 'y')",
        "STRUCT(a INT)",
    ],
)
def test_sample_ids_keep_their_type(db: Connection, kind: str) -> None:
    value = {
        "UUID": "lpad(i::VARCHAR, 32, '0')",
        "DATE": "DATE '2020-01-01' + i::INT",
        "TIMESTAMPTZ": "TIMESTAMPTZ '2020-01-01 00:00:00+00' + to_hours(i)",
        "STRUCT(a INT)": "{'a': i}",
        "ENUM ('x', 'y')": "CASE i % 2 WHEN 0 THEN 'x' ELSE 'y' END",
    }.get(kind, "i")
    db.sql(f"CREATE TABLE typed AS SELECT ({value})::{kind} AS sample_id, i, i * i % 7 AS j FROM range(20) t(i)")
    text = (
        "elite(typed, (SELECT * FROM (SELECT *, i = 3 AS is_anomaly FROM typed LIMIT 6)), epochs := 1, save_as := 'm')"
    )
    found = db.sql(f"SELECT typeof(sample_id), count(*) FROM {text} GROUP BY ALL").fetchall()
    (name,) = db.sql("SELECT typeof(sample_id) FROM typed LIMIT 1").fetchall()[0]
    assert found == [(name, 20)]
    assert db.sql(f"SELECT count(*) FROM typed t SEMI JOIN {text} e USING (sample_id)").fetchall() == [(20,)]
    chosen = db.sql(
        "SELECT DISTINCT typeof(c.sample_id) FROM elite_candidates('m', 4) c SEMI JOIN typed USING (sample_id)"
    )
    # Of the two ids of this type both have rows with a label.
    assert chosen.fetchall() == ([] if kind.startswith("ENUM") else [(name,)])


def test_ids_that_repeat_or_are_null(db: Connection) -> None:
    call = "elite((SELECT nullif(sample_id // 2, 4) AS sample_id, features FROM windows), epochs := 1, save_as := 'm')"
    found = db.sql(f"SELECT sample_id, count(*) FROM {call} GROUP BY ALL ORDER BY ALL").fetchall()
    assert found == [(number, 2) for number in (*range(4), *range(5, ROWS // 2), None)]


def test_rows_with_nulls_have_no_score_and_take_no_part(db: Connection) -> None:
    whole = "SELECT sample_id, features FROM windows WHERE sample_id NOT IN (5, 6)"
    db.sql(
        "CREATE TABLE gaps AS SELECT sample_id, CASE sample_id WHEN 5 THEN NULL WHEN 6 THEN list_prepend(NULL,"
        " features[2:]) ELSE features END AS features FROM windows"
    )
    found = sorted(db.sql("FROM elite(gaps, epochs := 2)").fetchall())
    assert found[5] == (5, None, None, None, None)
    assert found[6] == (6, None, None, None, None)
    assert found[:5] + found[7:] == sorted(db.sql(f"FROM elite(({whole}), epochs := 2)").fetchall())


def test_several_columns_in_any_order(db: Connection) -> None:
    data = "SELECT sample_id, a, b, bad FROM windows"
    first = f"elite(({data}), labelled := (SELECT a, b, bad, is_anomaly FROM reviewed), epochs := 2)"
    labelled = "(SELECT is_anomaly::INT AS Is_Anomaly, BAD, b, A FROM reviewed)"
    second = f"elite(({data}), labelled := {labelled}, epochs := 2)"
    rows = [np.array(sorted(db.sql(f"FROM {call}").fetchall()), dtype=np.float64) for call in (first, second)]
    np.testing.assert_allclose(rows[1], rows[0], rtol=1e-3, atol=1e-5)


def test_images_and_series(db: Connection) -> None:
    for shape, network in (("[[[i, 1], [2, 3]]]", "conv2d"), ("[range(9), range(i, i + 9)]", "conv1d")):
        text = f"elite((SELECT i AS sample_id, {shape} AS x FROM range(9) t(i)), epochs := 1, network := '{network}')"
        assert db.sql(f"SELECT count(anomaly_score) FROM {text}").fetchall() == [(9,)]


# Saving


def test_a_saved_model_scores_rows_as_it_was_trained(db: Connection) -> None:
    expected = dict(db.sql(f"SELECT sample_id, anomaly_score FROM {saved('m')}").fetchall())
    scored = "SELECT sample_id, anomaly_score('m', features) FROM windows"
    assert dict(db.sql(scored).fetchall()) == pytest.approx(expected, rel=1e-5)
    with metaql.connect(db._store.path) as other:
        other.sql(WINDOWS)
        assert dict(other.sql(scored).fetchall()) == pytest.approx(expected, rel=1e-5)
    assert db.sql("SELECT anomaly_score('m', NULL), anomaly_score(NULL, [1])").fetchall() == [(None, None)]
    odd = "SELECT anomaly_score('m', list_append(features[2:], x)) FROM windows, (VALUES ('nan'::FLOAT), (NULL)) v(x)"
    assert str(sorted(set(map(str, db.sql(odd).fetchall())))) == str(["(None,)", "(nan,)"])
    score = "anomaly_score('m', features)"
    best = f"SELECT sample_id FROM windows WHERE {score} > 0 ORDER BY {score} DESC LIMIT 1"
    assert db.sql(best).fetchall() == [(max(expected, key=lambda one: expected[one]),)]


def test_models_by_several_columns(db: Connection) -> None:
    db.sql("FROM elite((SELECT sample_id, a, b FROM windows), epochs := 1, save_as := 'ab')").fetchall()
    text = "SELECT anomaly_score('ab', a, b) - anomaly_score('ab', {'b': b, 'A': a}) FROM windows"
    assert set(db.sql(text).fetchall()) == {(0.0,)}


def test_one_of_several_models_for_each_row(db: Connection) -> None:
    for seed, name in enumerate(("one", "two")):
        db.sql(f"FROM {saved(name, seed)}").fetchall()
    text = "SELECT sample_id, anomaly_score(CASE sample_id % 3 WHEN 0 THEN 'one' WHEN 1 THEN 'two' END, features) AS s"
    by_row = db.sql(f"{text} FROM windows ORDER BY sample_id").fetchall()
    alone = [
        db.sql(f"SELECT anomaly_score('{one}', features) FROM windows ORDER BY sample_id").fetchall()
        for one in ("one", "two")
    ]
    assert by_row[2][1] is None
    as_enum = text.replace(" END, ", " END::ENUM('one', 'two'), ")
    assert db.sql(f"{as_enum} FROM windows ORDER BY sample_id").fetchall() == by_row
    assert [by_row[0][1], by_row[1][1]] == pytest.approx([alone[0][0][0], alone[1][1][0]])


def test_a_model_that_somebody_else_replaced_is_read_again(db: Connection, store: Path) -> None:
    db.sql(f"FROM {saved('m')}").fetchall()
    text = "SELECT sum(anomaly_score('m', features)) FROM windows"
    before = db.sql(text).fetchall()
    with metaql.connect(store) as other:
        other.sql(WINDOWS)
        other.sql(REVIEWED)
        other.sql(f"FROM {saved('m', seed=5)}").fetchall()
    assert db.sql(text).fetchall() != before


def test_saved_again_only_when_it_is_another(db: Connection) -> None:
    folder = db._store.path / "models" / "m"
    for seed, version in ((0, 1), (0, 1), (1, 2), (2, 3)):
        db.sql(f"FROM {saved('m', seed)}").fetchall()
        assert (folder / "HEAD").read_text().split()[0] == str(version)
    # The one before stays for those who read it.
    assert sorted({path.name[:8] for path in folder.glob("0*")}) == ["00000002", "00000003"]


def test_in_a_folder_of_its_own(db: Connection, tmp_path: Path) -> None:
    place = tmp_path / "models of mine" / "m"
    db.sql(f"FROM {saved(str(place))}").fetchall()
    assert db.sql(f"SELECT count(anomaly_score('{place}', features)) FROM windows").fetchall() == [(ROWS,)]
    assert len(db.sql(f"FROM elite_candidates('{place}', 2)").fetchall()) == 2
    assert not (db._store.path / "models").exists()


def test_candidates_are_rows_without_a_label(db: Connection) -> None:
    db.sql(f"FROM {saved('m')}").fetchall()
    found = db.sql("FROM elite_candidates('m', budget := 7)")
    assert found.columns == ["sample_id", "rank", "anomaly_score", "pseudo_label", "meta_gradient"]
    rows = found.fetchall()
    assert [row[1] for row in rows] == list(range(1, 8))
    assert not {row[0] for row in rows} & set(range(12))
    scores = dict(db.sql(f"SELECT sample_id, anomaly_score FROM {CALL}").fetchall())
    assert [row[2] for row in rows] == [scores[row[0]] for row in rows]
    assert len(db.sql("FROM elite_candidates('m', budget := 1000)").fetchall()) == ROWS - 12


def saved(name: str, seed: int = 0) -> str:
    return f"{CALL[:-1]}, seed := {seed}, save_as := '{name}')"


# Stopping


@pytest.mark.parametrize("wrong", [InterruptedError("stopped"), MemoryError()])
def test_nothing_is_left_of_a_training_that_was_stopped(
    db: Connection, monkeypatch: pytest.MonkeyPatch, wrong: BaseException
) -> None:
    def fail(*_: Any) -> None:
        raise wrong

    with monkeypatch.context() as patched:
        patched.setattr("metaql.udfs.work.Training.reached", fail)
        with pytest.raises(duckdb.InvalidInputException):
            db.sql(f"FROM {saved('m')}").fetchall()
    assert not (db._store.path / "models").exists()
    assert len(db.sql(f"FROM {saved('m')}").fetchall()) == ROWS


def test_training_says_how_far_it_is_and_hears_when_to_stop(db: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    work = session_of(db._executor._connection).work  # type: ignore[union-attr]
    heard: list[tuple[float, str] | None] = []
    monkeypatch.setattr(work, "go_on", lambda: heard.append(work.trained))
    db.sql(f"FROM {CALL}").fetchall()
    assert heard[0] == (0.0, "")
    assert heard[-1] is not None
    assert heard[-1][0] > 0
    assert heard[-1][1].startswith("validation loss ")
    assert work.trained is None
    monkeypatch.undo()
    with work.stopped(), pytest.raises(duckdb.InvalidInputException, match="stopped by Ctrl-C"):
        db.sql(f"FROM {CALL.replace('epochs := 2', 'epochs := 3')}").fetchall()


# Errors

AT_ONCE: list[tuple[str, type[Exception], str]] = [
    ("elite()", QueryError, r"elite\(data := NULL\): give a relation's name, or a SELECT that yields sample_id and"),
    ("elite((SELECT * FROM windws))", duckdb.CatalogException, 'Table with name windws .*\n.*"windows"'),
    ("elite(windws)", duckdb.CatalogException, "Table with name windws does not exist"),
    ("elite((SELECT feature FROM windows))", duckdb.BinderException, '"feature" not found'),
    (
        "elite((SELECT features FROM windows))",
        QueryError,
        r"elite\(data\): there is no column sample_id among",
    ),
    (
        f"elite({DATA}, (SELECT features FROM reviewed))",
        QueryError,
        r"elite\(labelled\): .* no column is_anomaly",
    ),
    (f"elite({DATA}, labelled = reviewed)", QueryError, "write labelled := …"),
    (f"elite({DATA}, epoch := 5)", UnknownNameError, "has no argument epoch. Did you mean epochs?"),
    (f"elite({DATA}, data := windows)", QueryError, "data is given twice"),
    (f"elite({DATA}, epochs := 0)", QueryError, "epochs must be a whole number from 1 on, not 0"),
    (f"elite({DATA}, epochs := 2.5)", QueryError, "epochs must be a whole number from 1 on, not 2.5"),
    (f"elite({DATA}, epochs := 'many')", QueryError, "epochs must be a whole number from 1 on, not 'many'"),
    (f"elite({DATA}, learning_rate := -0.1)", QueryError, "learning_rate must be a number greater than 0"),
    (f"elite({DATA}, detector := 'svd')", QueryError, "there is no detector 'svd', only svdd, autoencoder"),
    (f"elite({DATA}, network := 'resnet')", QueryError, "there is no network 'resnet', only mlp"),
    (f"elite({DATA}, save_as := '')", QueryError, "'' can't be the name of a model: use letters"),
    (f"elite({DATA}, save_as := 'a b')", QueryError, "'a b' can't be the name of a model: use letters"),
    (f"elite({DATA}, save_as := '../x')", QueryError, "'../x' can't be a model's folder: write its path without '..'"),
    (f"elite({DATA}, save_as := 5)", QueryError, r"elite\(save_as := 5\): give a name in quotes"),
    ("elite('SELECT * FORM windows')", QueryError, "syntax error at or near"),
    ("elite('SELECT 1; SELECT 2')", QueryError, "one SELECT and nothing else"),
    ("elite_candidates()", QueryError, "give the name that a model was saved as"),
    ("elite_candidates('none')", UnknownNameError, "there is no model 'none'. There are: none. FROM elite"),
    ("elite_candidates('m', budget := 0)", QueryError, "give how many rows you can label"),
]


@pytest.mark.parametrize("call, kind, message", AT_ONCE, ids=[each[0] for each in AT_ONCE])
def test_what_is_wrong_before_anything_runs(db: Connection, call: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        db.sql(f"FROM {call}")


def test_sub_queries_in_statements_that_can_t_be_changed(db: Connection) -> None:
    with pytest.raises(QueryError, match=r"takes a sub-query only in SELECT.*give the sub-query as a text in quotes"):
        db.sql(f"DESCRIBE FROM {CALL}")
    assert len(db.sql("DESCRIBE FROM elite('SELECT sample_id, a FROM windows')").fetchall()) == 5


LATER = [
    ("elite((SELECT sample_id FROM windows))", "no column of features beside sample_id"),
    ("elite(windows)", "features is a list, .* there is recorded_at, a, b, bad beside it"),
    (
        "elite((SELECT sample_id, a, recorded_at FROM windows))",
        r"recorded_at is a TIMESTAMP.*epoch\(recorded_at",
    ),
    ("elite((SELECT sample_id, union_value(n := a) AS f FROM windows))", r"f is a UNION: .*union_extract\(f, 'member"),
    ("elite((SELECT sample_id, [union_value(n := a)] AS f FROM windows))", "f is a UNION"),
    ("elite((SELECT union_value(n := sample_id) AS sample_id, a FROM windows))", "sample_id is a UNION"),
    ("elite((SELECT sample_id, 'x' AS f FROM windows))", "f is a VARCHAR, and features must be numbers"),
    (
        "elite((SELECT sample_id, features[:1 + sample_id % 2] AS f FROM windows))",
        "sample_id 0 has 1, and sample_id 1",
    ),
    (
        "elite((SELECT sample_id, CASE WHEN a > .9 THEN 'inf'::FLOAT ELSE 1 END AS f FROM windows))",
        "NaN or infinity",
    ),
    ("elite((SELECT sample_id, gradient FROM train))", r"gradient is a GRADIENT.*restore\(gradient, '\*'\)"),
    ("elite((FROM windows WHERE false))", "there are no rows to look at"),
    ("elite((SELECT sample_id, a FROM windows LIMIT 1))", "training needs 2 rows or more .* of 1 there is one"),
    ("elite((SELECT sample_id, NULL AS a FROM windows))", f"training needs 2 rows or more .* of {ROWS} there is none"),
    (f"elite({DATA}, {LABELLED[:-1]} WHERE is_anomaly))", "all 2 rows with a label are anomalies.*is_anomaly = FALSE"),
    (f"elite({DATA}, {LABELLED[:-1]} WHERE NOT is_anomaly))", "all 10 rows with a label are normal.*is_anomaly = TRUE"),
    (
        f"elite({DATA}, {LABELLED.replace('features,', 'features[:5] AS features,')})",
        "these rows: 5; .*: 6. Both must",
    ),
    (f"elite({DATA}, {LABELLED.replace('is_anomaly', 'sample_id AS is_anomaly')})", "is_anomaly must be TRUE or FALSE"),
    (
        f"elite({DATA}, {LABELLED.replace('is_anomaly', repr('yes') + ' AS is_anomaly')})",
        "is_anomaly must be a BOOLEAN, .*'yes'",
    ),
    (
        "elite((SELECT sample_id, a, b FROM windows), (SELECT a, is_anomaly FROM reviewed))",
        r"elite\(labelled\) lacks b",
    ),
    (
        "elite((SELECT sample_id, a FROM windows), (SELECT a AS x, b, is_anomaly FROM reviewed))",
        "has x, b, which elite",
    ),
    (f"elite({DATA}, detector := 'deepsad')", "detector 'deepsad' learns from labels: give some labelled rows"),
    (f"elite({DATA}, network := 'conv2d')", "network 'conv2d' takes images"),
    (f"elite({DATA}, epochs := (SELECT 0))", "epochs must be a whole number from 1 on, not 0"),
]


@pytest.mark.parametrize("call, message", LATER, ids=[each[0] for each in LATER])
def test_what_is_wrong_with_the_rows(db: Connection, call: str, message: str) -> None:
    relation = db.sql(f"FROM {call}")
    with pytest.raises(duckdb.InvalidInputException, match=message):
        relation.fetchall()


@pytest.mark.parametrize(
    "call, message",
    [
        ("anomaly_score('other', features)", "there is no model 'other'. There are: model. FROM elite"),
        ("anomaly_score('modle', features)", "Did you mean 'model'?"),
        ("anomaly_score('model')", "give a model's name, and a list or columns of features"),
        ("anomaly_score(features, 'model')", "the model's name comes first, in quotes"),
        ("anomaly_score('model', features[:4])", r"features of these rows: 4; of those .* trained on: 6\. Give it"),
        ("anomaly_score('model', a, b)", r"features of these rows: 2; of those .* trained on: 6\. Give it"),
        ("anomaly_score('model', recorded_at)", "argument 2 is a TIMESTAMP, and features must be numbers"),
        ("anomaly_score('model', features, a)", "argument 2 is a list"),
        ("anomaly_score('model', union_value(n := a))", "argument 2 is a .*union.*, and features must be numbers"),
        ("anomaly_score('model', {'f': union_value(n := a)})", "f is a UNION"),
        ("anomaly_score('a b', features)", "'a b' can't be the name of a model"),
    ],
)
def test_what_is_wrong_with_scoring(db: Connection, call: str, message: str) -> None:
    db.sql(f"FROM {saved('model')}").fetchall()
    with pytest.raises(duckdb.InvalidInputException, match=message):
        db.sql(f"SELECT {call} FROM windows").fetchall()


def test_places_that_can_t_be_written_are_told_of_before_training(
    db: Connection, tmp_path: Path, fits: list[elite.Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QueryError, match="that is a file"):
        db.sql(f"FROM {saved(str(tmp_path / 'file'))}")
    with pytest.raises(QueryError, match="a folder with other files in it"):
        db.sql(f"FROM {saved(str(tmp_path))}")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(WriteError, match=r"is read-only. Ask for permission .*save_as := '/path/of/a/folder'"):
        db.sql(f"FROM {saved('m')}")
    assert fits == []
