"""Random queries over random small stores, three times: planned, as they stand, and by loops in numpy.

METAQL_QUERIES says how many (200), METAQL_SEED from which seed on (0); a failure prints its own seed and text.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pytest

import metaql
from metaql.connection import Connection
from tests.queries.compare import differences
from tests.queries.counting import counted
from tests.queries.draw import Draw
from tests.queries.evaluate import Evaluator
from tests.queries.model import Select, averages_vectors
from tests.queries.pairs import plan_tiles
from tests.queries.spelling import Spelling
from tests.queries.stores import POOL, PlainStore, record

COUNT = int(os.environ.get("METAQL_QUERIES", "200"))
FIRST = int(os.environ.get("METAQL_SEED", "0"))
# Where a query's rows go before they are compared.
RESULTS = ("as it is",) * 8 + ("table", "insert", "file", "twice")

# Known to the queries by its name here.
frame = pd.DataFrame(
    {"sample_id": [0, 1, 2, 3, 5, 5], "bonus": [1.0, 2.0, -1.0, 0.5, 3.0, 4.0], "note": list("aabbcc")}
)


@dataclass
class Opened:
    """A store, open, and what is in it."""

    db: Connection
    plain: PlainStore
    folder: Path


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Opened]]:
    """Every store of the pool, each with a table of the user's own."""
    opened = []
    for seed, recipe in enumerate(POOL):
        folder = tmp_path_factory.mktemp("pool")
        plain = record(folder / "store", recipe, seed)
        db = metaql.connect(folder / "store")
        db.sql("CREATE TABLE extra AS FROM frame")
        plain.relations["extra"] = plain.relations["frame"] = frame.to_dict("records")
        opened.append(Opened(db, plain, folder))
    yield opened
    for one in opened:
        one.db.close()


@dataclass
class Asked:
    """A query as text, with what it should answer. ``text`` is what asks it, ``sql`` what reads the rows kept."""

    text: str
    sql: str
    parameters: Any
    setup: list[str]
    teardown: list[str]
    expected: list[tuple[Any, ...]]
    tolerance: float
    order: tuple[int, bool] | None
    needs_plan: bool


def ask(seed: int, pool: list[Opened]) -> tuple[Opened, Asked]:
    """The query of a seed, and the store it is for."""
    rng = np.random.default_rng(seed)
    opened = pool[int(rng.integers(len(pool)))]
    select = Draw(rng, opened.plain).select()
    result = RESULTS[int(rng.integers(len(RESULTS)))]
    spelling = Spelling(rng, f"s{seed}", float(rng.random()), result == "as it is")
    evaluator = Evaluator(opened.plain)
    text, rows = spelling.text(select), evaluator.rows(select)
    if result == "twice":
        text, rows = f"({text}) UNION ALL ({text})", rows * 2
    setup, teardown = kept(result, text, f"kept_{seed}", opened.folder)
    asked = Asked(
        text,
        text if not setup else f"FROM kept_{seed}",
        spelling.parameters,
        [*spelling.setup, *setup],
        [*teardown, *spelling.teardown],
        rows,
        2e-6 * evaluator.magnitude * max(1, len(rows)),
        None if result != "as it is" else order_of(select),
        averages_vectors(select),
    )
    return opened, asked


def kept(result: str, text: str, name: str, folder: Path) -> tuple[list[str], list[str]]:
    """Statements that keep a query's rows under a name, and those that drop them."""
    dropped = [f"DROP TABLE {name}"]
    if result == "table":
        return [f"CREATE TABLE {name} AS {text}"], dropped
    if result == "insert":
        return [f"CREATE TABLE {name} AS FROM ({text}) LIMIT 0", f"INSERT INTO {name} {text}"], dropped
    if result == "file":
        path = folder / f"{name}.parquet"
        return [f"COPY ({text}) TO '{path}'", f"CREATE VIEW {name} AS FROM '{path}'"], [f"DROP VIEW {name}"]
    return [], []


def order_of(select: Select) -> tuple[int, bool] | None:
    """The place of the column that the rows are ordered by, and whether downwards."""
    if not select.order:
        return None
    name, descending = select.order[0]
    return [column for column, _ in select.columns].index(name), descending


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_planned_and_unplanned_and_in_numpy(seed: int, pool: list[Opened]) -> None:
    compare(seed, pool)


@pytest.mark.parametrize("seed", range(FIRST + COUNT, FIRST + COUNT + COUNT // 4))
def test_in_tiles(seed: int, pool: list[Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of other queries whose pairs are planned as if they were many."""
    plan_tiles(monkeypatch)
    compare(seed, pool)


def compare(seed: int, pool: list[Opened]) -> None:
    """The query of a seed must give the rows that loops do, however it is run."""
    opened, asked = ask(seed, pool)
    words = "\n".join([f"METAQL_SEED={seed}", *asked.setup, asked.sql, f"parameters {asked.parameters}"])
    try:
        for statement in asked.setup:
            opened.db.sql(statement)
        planned = opened.db.sql(asked.sql, asked.parameters).fetchall()
        plain = unplanned(opened.db, asked)
    except duckdb.InternalException:
        if not fails_unplanned(opened.db, asked):
            raise
        pytest.skip("DuckDB fails at the text as it stands")
    except Exception as error:
        error.add_note(words)
        raise
    finally:
        drop(opened.db, asked.teardown)
    for way, found in (("planned", planned), ("unplanned", plain)):
        wrong = None if found is None else differences(asked.expected, found, asked.tolerance, asked.order)
        assert wrong is None, f"{way}:\n{words}\n{wrong}"


def unplanned(db: Connection, asked: Asked) -> list[tuple[Any, ...]] | None:
    """The rows without any planning; None where only a plan can average gradients, and where DuckDB itself breaks."""
    if asked.needs_plan:
        return None
    assert db._executor is not None
    try:
        return list(db._executor.run(asked.sql, asked.parameters, sys._getframe()).fetchall())
    except duckdb.InternalException:
        return None


def fails_unplanned(db: Connection, asked: Asked) -> bool:
    """Whether DuckDB has an internal error with the text itself."""
    assert db._executor is not None
    try:
        db._executor.run(asked.text, asked.parameters, sys._getframe()).fetchall()
    except duckdb.InternalException:
        return True
    return False


def drop(db: Connection, statements: list[str]) -> None:
    """Runs them all, as far as there is something to drop."""
    for statement in statements:
        db.sql(statement.replace("DROP TABLE", "DROP TABLE IF EXISTS").replace("DROP VIEW", "DROP VIEW IF EXISTS"))


def test_planning_saves_work(pool: list[Opened]) -> None:
    """Whatever the plans look like: many of the queries multiply and add up far fewer references than as they stand."""
    less = 0
    for seed in range(100):
        opened, asked = ask(seed, pool)
        if asked.setup or asked.needs_plan:
            continue
        with counted() as work:
            opened.db.sql(asked.sql, asked.parameters).fetchall()
        with counted() as before:
            unplanned(opened.db, asked)
        less += work.total < 0.6 * before.total
        if less > 10:
            return
    pytest.fail(f"only {less} of them do")
