"""What EXPLAIN says, letter by letter: one file of ``explain/`` for each query.

A file holds the statement, a line ``----``, and the plan. One that begins with ``# tiles`` is planned as if its pairs
were many. ``pytest tests/test_explain.py --complete`` writes what came into the files: read the diff.

Estimates are those of the costs that MetaQL is shipped with, on a store of 60 training and 40 validation samples.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

import metaql
from metaql.connection import Connection
from tests.queries.pairs import plan_tiles
from tests.queries.stores import record
from tests.test_spellings import RECIPE

FILES = sorted((Path(__file__).parent / "explain").glob("*.txt"))
P2B = """SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS influence
FROM train t, validation v WHERE t.loss > 0.5 GROUP BY t.sample_id"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explain") / "store"
    record(path, RECIPE, 4)
    return path


@pytest.fixture
def db(store: Path) -> Iterator[Connection]:
    with metaql.connect(store) as connection:
        yield connection


def explained(db: Connection, text: str, parameters: list[object] | None = None) -> list[str]:
    return [str(row[0]) for row in db.sql(text, parameters).fetchall()]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_explain(path: Path, db: Connection, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> None:
    head, expected = path.read_text().split("----\n")
    if head.startswith("# tiles\n"):
        plan_tiles(monkeypatch)
    found = "".join(f"{line}\n" for line in explained(db, head.removeprefix("# tiles\n")))
    if pytestconfig.getoption("--complete"):
        path.write_text(f"{head}----\n{found}")
    assert found == expected


def test_explaining_does_nothing(db: Connection, tmp_path: Path) -> None:
    explained(db, f"EXPLAIN CREATE TABLE scores AS {P2B}")
    explained(db, f"EXPLAIN COPY ({P2B}) TO '{tmp_path / 'scores.parquet'}'")
    assert not list(tmp_path.iterdir())
    with pytest.raises(duckdb.CatalogException):
        db.sql("FROM scores").fetchall()


def test_the_plan_is_a_relation(db: Connection) -> None:
    relation = db.sql(f"EXPLAIN {P2B}")
    assert (relation.columns, list(map(str, relation.types))) == (["plan"], ["VARCHAR"])
    assert relation.fetchall() == relation.fetchall()


def test_parameters(db: Connection) -> None:
    lines = explained(db, f"EXPLAIN {P2B.replace('0.5', '?')}", [0.5])
    assert any("Scan train AS t where t.loss > $1" in line for line in lines)
    assert any(line.startswith("Chosen: gather v, ") for line in lines)


def true_rows(lines: list[str]) -> dict[str, int]:
    """What was counted of each step that says so."""
    found = (re.fullmatch(r"[│├└─ ]*(\S.*?) {2,}.*true ([\d,]+)", line) for line in lines)
    return {one[1]: int(one[2].replace(",", "")) for one in found if one}


def totals(lines: list[str]) -> dict[str, list[int]]:
    """The whole numbers behind each total."""
    found = (re.match(r"(Result|Scored|Cache): (.*)", line) for line in lines)
    return {one[1]: [int(each.replace(",", "")) for each in re.findall(r"[\d,]*\d", one[2])] for one in found if one}


def test_what_happened(db: Connection) -> None:
    lines = explained(db, f"EXPLAIN ANALYZE {P2B}")
    ((rows,),) = db.sql("SELECT count(*) FROM train WHERE loss > 0.5").fetchall()
    assert 0 < rows < 60
    assert true_rows(lines) == {"Scan train AS t where t.loss > 0.5": rows, "Scan validation AS v": 40}
    found = totals(lines)
    assert found["Result"][0] == rows
    # The rows beside those that were asked for may be scored as well.
    assert found["Scored"][0] >= rows
    assert found["Cache"] == [0, found["Scored"][0]]


def test_what_is_kept_need_not_be_scored_again(db: Connection) -> None:
    first, second = (totals(explained(db, f"EXPLAIN ANALYZE {P2B}")) for _ in range(2))
    rows = first["Result"][0]
    assert first["Cache"][0] == 0
    assert second["Cache"] == [rows, 0]
    assert second["Scored"][0] == 0
    assert second["Result"][0] == rows


def test_what_happened_pair_by_pair(db: Connection) -> None:
    text = f"{P2B.replace('avg(', 'max(').replace('t.loss > 0.5', 't.label = v.label')} ORDER BY influence LIMIT 4"
    lines = explained(db, f"EXPLAIN (ANALYZE) {text}")
    ((pairs,),) = db.sql("SELECT count(*) FROM train t JOIN validation v USING (label)").fetchall()
    assert true_rows(lines) == {
        "Join on t.label = v.label": pairs,
        "Scan train AS t": 60,
        "Scan validation AS v": 40,
    }
    assert totals(lines)["Result"][0] == 4
    assert totals(lines)["Scored"][0] >= pairs


def test_both_options(db: Connection) -> None:
    lines = explained(db, f"EXPLAIN (ANALYZE, VERBOSE) {P2B}")
    assert "SQL for DuckDB:" in lines
    assert {"Result", "Scored", "Cache"} == totals(lines).keys()


@pytest.mark.parametrize("text", ["SELECT avg(loss) FROM train", "SELECT 'gradient'", "FROM layers"])
def test_without_gradients_it_is_duckdbs_own(text: str, db: Connection) -> None:
    relation = db.sql(f"EXPLAIN {text}")
    assert relation.columns == ["explain_key", "explain_value"]
    ((key, plan),) = relation.fetchall()
    assert key == "physical_plan"
    assert "╭" in plan or "┌" in plan


def test_other_formats_are_duckdbs_plan_of_what_is_run(db: Connection) -> None:
    ((_, plan),) = db.sql(f"EXPLAIN (FORMAT JSON) {P2B}").fetchall()
    assert json.loads(plan)
    assert "metaql_mean" in plan
    # Of the query as it was written there would be pairs.
    assert "NESTED_LOOP" not in plan
    assert "inner_product" not in plan
