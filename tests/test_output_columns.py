"""A plan leaves the names and types of a result's columns as DuckDB gives them to the plain text."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import duckdb
import pyarrow as pa
import pytest

import metaql
from metaql.connection import Connection
from tests.queries.stores import record
from tests.test_spellings import RECIPE, SPELLINGS, Spelling

# Known to the texts of the spellings by its name here.
wanted = pa.table({"label": [1]})

PAIR = "inner_product(t.gradient, v.gradient)"
PAIRS = "FROM train t, validation v"
LISTS = (
    f"avg({PAIR})",
    f"sum({PAIR})",
    f"AVG( {PAIR} )",
    f"mean({PAIR})",
    f"count(*), count({PAIR}), avg({PAIR})",
    f"sum({PAIR}) / count(*)",
    f"avg({PAIR})::FLOAT",
    f"cast(avg({PAIR}) AS DECIMAL(18, 3))",
    f"round(avg({PAIR}), 3)",
    f"-avg({PAIR}) * 2 + 1",
    f"coalesce(avg({PAIR}), 0)",
    f"avg({PAIR}) > 0",
    f"CASE WHEN avg({PAIR}) > 0 THEN 'good' ELSE 'bad' END",
    f'avg({PAIR}) AS "My Score", avg({PAIR}) AS other',
    f"avg({PAIR}) AS avg, sum({PAIR}) sum",
    "avg(cosine_similarity(t.gradient, v.gradient))",
    f"avg(t.loss * {PAIR} * v.loss)",
    f"avg({PAIR}), min(t.loss), max(v.label), any_value(v.prediction)",
    f"avg({PAIR}), sum(t.label), sum(v.loss), avg(t.label), avg(v.label)",
    f"avg({PAIR}), sum(t.confidence), avg(t.confidence), sum(v.confidence)",
    f"avg({PAIR}), count(v.label), count(DISTINCT v.label), count(t.label)",
    f"avg({PAIR}), rank() OVER (ORDER BY avg({PAIR}))",
    f"avg({PAIR}) AS s, s + 1, s * 2 AS twice",
    f"max({PAIR})",
    f"avg({PAIR}) FILTER (WHERE v.loss > 1)",
)
KEYS = ("", "t.sample_id", "v.sample_id", "t.label, v.label", "t.sample_id % 3", "T.Sample_ID", "t.label = v.label")
TEXTS = (
    *(
        f"SELECT {f'{key}, ' if key else ''}{one} {PAIRS}{f' GROUP BY {key}' if key else ''}"
        for key in KEYS
        for one in LISTS
    ),
    f"SELECT t.sample_id, (SELECT avg({PAIR}) FROM validation v) FROM train t",
    f"SELECT t.sample_id, x.* FROM train t, LATERAL (SELECT avg({PAIR}) FROM validation v) x",
    f"SELECT * FROM (SELECT t.sample_id, avg({PAIR}) {PAIRS} GROUP BY t.sample_id)",
    f"WITH p AS (SELECT t.sample_id, {PAIR} {PAIRS}) SELECT * FROM p",
    f"SELECT t.sample_id, {PAIR}, -{PAIR}, abs({PAIR}) {PAIRS}",
    "SELECT norm(gradient), norm(t.gradient) AS n, gradient FROM train t",
    f"SELECT t.gradient, avg({PAIR}) {PAIRS} GROUP BY t.gradient",
    # What is written otherwise in the SQL that runs.
    f"SELECT list(s) FROM (SELECT avg({PAIR}) AS s {PAIRS} GROUP BY v.label)",
    f"SELECT avg({PAIR}), bool_and(t.label = 1) {PAIRS} GROUP BY v.label",
    f"SELECT sum({PAIR} * if(v.loss > 1, 1, -1)) {PAIRS} GROUP BY t.sample_id",
    f"SELECT (SELECT avg({PAIR}) {PAIRS})",
    f"SELECT (SELECT avg({PAIR}) FROM validation v WHERE v.label = t.label) FROM train t",
    f"WITH t AS (FROM train), v AS (FROM validation) SELECT sum(2 * {PAIR}) FROM t, v",
    f"SELECT t.sample_id, avg({PAIR}) {PAIRS} GROUP BY t.sample_id UNION ALL SELECT 1, 2",
    "SELECT * FROM p2b()",
    "SELECT avg(influence) FROM p2p()",
)
# What DuckDB names a column without an alias after is its text, which is printed otherwise or changed.


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    path = tmp_path_factory.mktemp("columns") / "store"
    record(path, RECIPE, 4)
    with metaql.connect(path) as connection:
        yield connection


def columns(relation: Any) -> list[tuple[str, str]]:
    return list(zip(relation.columns, map(str, relation.types), strict=True))


def plain(db: Connection, text: str, parameters: Any = None) -> Any:
    assert db._executor is not None
    return db._executor.run(text, parameters, sys._getframe())


@pytest.mark.parametrize("text", TEXTS)
def test_names_and_types(text: str, db: Connection) -> None:
    assert columns(db.sql(text)) == columns(plain(db, text))


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda one: one.name)
def test_names_and_types_of_spellings(spelling: Spelling, db: Connection) -> None:
    """Those that DuckDB can bind by itself: it has no average of gradients."""
    *before, last = spelling.statements
    for statement in before:
        db.sql(statement)
    found = columns(db.sql(last, spelling.parameters))
    try:
        expected = columns(plain(db, last, spelling.parameters))
    except duckdb.BinderException:
        return
    assert found == expected
