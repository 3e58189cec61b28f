"""Pairs that are scored in tiles, of lists of three, against the same text as DuckDB runs it by itself.

METAQL_PAIRS says how many queries (120), METAQL_SEED from which seed on (0); a failure prints its own seed and text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import metaql
from metaql.connection import Connection
from tests.queries.compare import Rows, differences
from tests.queries.pairs import TABLES, Draw, Drawn, plan_tiles
from tests.queries.stores import Collected, Recipe, record

COUNT = int(os.environ.get("METAQL_PAIRS", "120"))
FIRST = int(os.environ.get("METAQL_SEED", "0"))
RECIPE = Recipe(
    ("fc1", "head"),
    1,
    (Collected("train", tuple(range(17))), Collected("validation", tuple(range(3, 14)))),
    lambda split, number: None if number % 6 == 4 else number % 3,
)


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Connection]:
    """A small store whose pairs are planned as if they were many."""
    path = tmp_path_factory.mktemp("pairs") / "store"
    record(path, RECIPE, 1)
    with pytest.MonkeyPatch.context() as patch, metaql.connect(path) as connection:
        plan_tiles(patch)
        for statement in TABLES:
            connection.sql(statement)
        yield connection


def unplanned(db: Connection, text: str) -> Any:
    assert db._executor is not None
    return db._executor.run(text, None, sys._getframe())


def planned_text(db: Connection, text: str) -> str:
    return db._planned(text, sys._getframe())


def wrong(db: Connection, drawn: Drawn) -> str | None:
    """What differs; None if nothing does."""
    relation, plain = db.sql(drawn.text), unplanned(db, drawn.text)
    if (relation.columns, relation.types) != (plain.columns, plain.types):
        return f"columns {relation.columns} {relation.types}, not {plain.columns} {plain.types}"
    found, expected = relation.fetchall(), plain.fetchall()
    if drawn.ordered is not None:
        scores = [[(row[drawn.ordered],) for row in rows] for rows in (expected, found)]
        if scores[0] != scores[1]:
            return f"in the order\n{scores[0]}\nbut got\n{scores[1]}"
    if drawn.decided is None:
        return differences(expected, found, 1e-6)
    problem = differences(cut(expected, drawn.decided), cut(found, drawn.decided), 1e-6)
    every = set(unplanned(db, drawn.every or "").fetchall())
    return problem or (f"no pairs: {set(found) - every}" if set(found) - every else None)


def cut(rows: Rows, places: tuple[int, ...]) -> Rows:
    return [tuple(row[place] for place in places) for row in rows]


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_in_tiles_and_pair_by_pair(seed: int, db: Connection) -> None:
    drawn = Draw(seed).query()
    words = f"METAQL_SEED={seed}\n{drawn.text}"
    try:
        problem = wrong(db, drawn)
    except Exception as error:
        error.add_note(f"{words}\n{planned_text(db, drawn.text)}")
        raise
    assert problem is None, f"{words}\n{planned_text(db, drawn.text)}\n{problem}"


PAIRS = "FROM train t, validation v"
SCORE = "inner_product(t.gradient, v.gradient)"
SCORED = f"SELECT t.sample_id, v.sample_id AS other, {SCORE} AS s {PAIRS}"
RANK = "rank() OVER (PARTITION BY t.sample_id ORDER BY s)"
# Near to what is planned as the best few of all or of each, and not always that.
NEAR = {
    "the order by its place": f"{SCORED} ORDER BY 3 DESC, 1, 2 LIMIT 4",
    "ORDER BY ALL": f"SELECT {SCORE} AS s, t.sample_id, v.sample_id {PAIRS} ORDER BY ALL LIMIT 4",
    "the order upside down": f"{SCORED} ORDER BY -s, 1, 2 LIMIT 4",
    "the order of a function": f"{SCORED} ORDER BY abs(s), 1, 2 LIMIT 4",
    "a computed limit": f"{SCORED} ORDER BY s, 1, 2 LIMIT (SELECT 4)",
    "a sum as a limit": f"{SCORED} ORDER BY s, 1, 2 LIMIT 2 + 2",
    "no rows": f"{SCORED} ORDER BY s, 1, 2 LIMIT 0",
    "a range of ranks": f"{SCORED} QUALIFY {RANK} BETWEEN 1 AND 2",
    "turned round": f"{SCORED} QUALIFY 2 >= {RANK}",
    "the others": f"{SCORED} QUALIFY NOT {RANK} <= 2",
    "or": f"{SCORED} QUALIFY {RANK} <= 2 OR s > 5",
    "a fraction": f"{SCORED} QUALIFY {RANK} <= 2.5",
    "a frame": f"{SCORED} QUALIFY {RANK[:-1]} ROWS BETWEEN 1 PRECEDING AND CURRENT ROW) <= 2",
    "an alias of the rank": f"SELECT t.sample_id, {SCORE} AS s, {RANK} AS r {PAIRS} QUALIFY r <= 2",
    "a rank of everything and a limit": f"SELECT v.loss, {SCORE} AS s, {RANK} AS r {PAIRS} ORDER BY s, 1, r LIMIT 3",
    "the best of each, and of these the best": f"{SCORED} QUALIFY {RANK} <= 2 ORDER BY s DESC, 1, 2 LIMIT 3",
    "an alias of another column": f"SELECT t.sample_id AS s, {SCORE} AS x {PAIRS} ORDER BY s, x, v.sample_id LIMIT 3",
    "everything": f"SELECT *, {SCORE} AS s {PAIRS} ORDER BY s, t.sample_id, v.sample_id LIMIT 3",
    "a field of a gradient": f'SELECT t.gradient."row" AS g, {SCORE} AS s {PAIRS} ORDER BY s, g, v.sample_id LIMIT 3',
    "in a struct": f"SELECT struct_pack(a := t.sample_id, s := {SCORE})::VARCHAR AS x {PAIRS} ORDER BY x LIMIT 3",
    "arithmetic with it": f"SELECT -{SCORE} / norm(t.gradient) AS s, t.loss {PAIRS} ORDER BY s, 2, v.sample_id LIMIT 3",
    "our own names": f"SELECT v.sample_id AS metaql_place, {SCORE} AS metaql_score_1 {PAIRS} ORDER BY 2, 1 LIMIT 3",
    "one relation twice": f"SELECT t.loss, v.loss, {SCORE} AS s FROM train t JOIN train v ON t.sample_id < v.sample_id",
    "a row twice": f"SELECT t.a, {SCORE} AS s FROM (FROM train SELECT sample_id AS a, gradient UNION ALL FROM train"
    " SELECT sample_id + 100, gradient) t, validation v ORDER BY s, a, v.sample_id LIMIT 6",
    "a third relation": f"SELECT t.sample_id, {SCORE} AS s {PAIRS}, checkpoints c ORDER BY s, 1, v.sample_id LIMIT 3",
    "layers as a side": "SELECT t.sample_id, l.layer, inner_product(layers(t.gradient, l.layer), v.gradient) AS s"
    f" {PAIRS}, layers l ORDER BY s, 1, 2, v.sample_id LIMIT 5",
    "three sides": f"SELECT {SCORE} AS s, inner_product(t.gradient, w.gradient) AS r {PAIRS}, validation w"
    " ORDER BY s, r LIMIT 9",
    "grouping sets": f"SELECT t.label, max({SCORE}) {PAIRS} GROUP BY ROLLUP (t.label)",
    "the three largest": f"SELECT t.sample_id, max({SCORE}, 3) {PAIRS} GROUP BY t.sample_id",
    "in an order": f"SELECT t.sample_id, first({SCORE} ORDER BY v.loss, v.sample_id) {PAIRS} GROUP BY t.sample_id",
    "side by side": f"SELECT t.sample_id, {SCORE} AS s FROM train t POSITIONAL JOIN validation v",
    "as of": f"SELECT t.sample_id, {SCORE} AS s FROM train t ASOF JOIN validation v ON t.sample_id >= v.sample_id",
    "a share of all": f"{SCORED} ORDER BY s DESC, 1, 2 LIMIT 10%",
    "the first of each": f"SELECT DISTINCT ON (t.sample_id) t.sample_id, {SCORE} AS s {PAIRS} ORDER BY t.sample_id, s",
    "a whole row": f"SELECT t::VARCHAR AS t, {SCORE} AS s {PAIRS} ORDER BY s, t.sample_id, v.sample_id LIMIT 3",
    "names of functions": f"SELECT t.sample_id, max_by(v.sample_id, {SCORE}) {PAIRS} GROUP BY t.sample_id",
    "merged columns": f"SELECT label, {SCORE} AS s FROM train t JOIN validation v USING (label)",
}


@pytest.mark.parametrize("name", NEAR)
def test_what_is_nearly_the_best_few(name: str, db: Connection) -> None:
    problem = wrong(db, Drawn(NEAR[name]))
    assert problem is None, f"{NEAR[name]}\n{planned_text(db, NEAR[name])}\n{problem}"


def test_arithmetic_of_gradients(db: Connection) -> None:
    """Only a plan can run it, so that it is compared with the same arithmetic of numbers."""
    text = SCORED.replace(SCORE, "inner_product(-t.gradient, 2 * v.gradient)")
    expected = unplanned(db, SCORED.replace(SCORE, f"-2 * {SCORE}")).fetchall()
    assert differences(expected, db.sql(text).fetchall(), 1e-6) is None


def test_most_of_them_are_in_tiles(db: Connection) -> None:
    texts = [planned_text(db, Draw(seed).query().text) for seed in range(100)]
    assert sum("metaql_lists" in one for one in texts) > 60
    assert sum("metaql_best(" in one for one in texts) > 10
