"""Random queries, three times: with the rules, without them, and by a loop over pairs in numpy.

METAQL_QUERIES says how many (60), METAQL_SEED from which seed on (0); a failure prints its own seed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import metaql
from metaql.connection import Connection

COUNT = int(os.environ.get("METAQL_QUERIES", "60"))
FIRST = int(os.environ.get("METAQL_SEED", "0"))
# Inner products of small whole numbers are exact in float32; averages are rounded once or twice.
TOLERANCE = 1e-5

Row = dict[str, Any]
# SQL beside the same thing in Python, of a row of t, a row of v, or both.
CONDITIONS = {
    "t": [("t.loss > 0.6", lambda t: t["loss"] > 0.6), ("t.label <> 1", lambda t: t["label"] not in (1, None))],
    "v": [
        ("v.label = 1", lambda v: v["label"] == 1),
        ("v.loss < 1.6 AND v.sample_id > 0", lambda v: v["loss"] < 1.6 and v["sample_id"] > 0),
        ("(v.label IS NULL OR v.loss > 9)", lambda v: v["label"] is None),
        ("v.loss > 99", lambda v: False),
    ],
}
BOTH = [("t.label = v.label", lambda t, v: t["label"] is not None and t["label"] == v["label"])]
KEYS = {
    "t.sample_id": lambda t, v: t["sample_id"],
    "t.label": lambda t, v: t["label"],
    "t.sample_id % 3": lambda t, v: t["sample_id"] % 3,
    "v.sample_id": lambda t, v: v["sample_id"],
    "v.label": lambda t, v: v["label"],
}
WEIGHTS = {
    "": lambda t, v: 1,
    "t.loss * ": lambda t, v: t["loss"],
    "v.label * ": lambda t, v: v["label"],
    "-v.loss * t.label * ": lambda t, v: None if t["label"] is None else -v["loss"] * t["label"],
    "(t.loss + v.loss) * ": lambda t, v: t["loss"] + v["loss"],
}
PATTERNS = {"": "*", "fc1": "fc1.*", "block.*": "block.*", "*.bias": "*.bias"}
JOINS = (", {} ", " CROSS JOIN {} ", " JOIN {} ON true ", " INNER JOIN {} ON 1 = 1 ")


@pytest.fixture(scope="module")
def db(small_store: Path) -> Iterator[Connection]:
    with metaql.connect(small_store) as connection:
        yield connection


@pytest.fixture(scope="module")
def rows(db: Connection, small_gradients: np.ndarray) -> dict[str, list[Row]]:
    """The samples of both sides with their laid-out gradients."""
    query = "SELECT sample_id, label, loss, gradient.row AS row FROM {} ORDER BY row"
    found = {}
    for alias, relation in (("t", "train"), ("v", "validation")):
        table = db.sql(query.format(relation)).to_arrow_table().to_pylist()
        found[alias] = [{**row, "gradient": small_gradients[row["row"]]} for row in table]
    return found


def mask_of(db: Connection, pattern: str) -> np.ndarray:
    """1 where a laid-out gradient belongs to the pattern."""
    if not pattern:
        return np.ones(1)
    chosen = db._source.space.select(pattern)
    places = {(one.layer.name, place) for one in chosen for place in one.places}
    return np.concatenate(
        [
            np.full(parameter.width, float((layer.name, place) in places))
            for layer in db._source.space.layers
            for place, parameter in enumerate(layer.parameters)
        ]
    )


class Query:
    """A random query, as SQL and as a loop."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)

        def pick(options: Any) -> Any:
            options = list(options)
            return options[int(rng.integers(len(options)))]

        self.key = pick([None, *KEYS, "t.sample_id", "t.sample_id"])
        self.function, self.weight = pick(["avg", "sum"]), pick([*WEIGHTS, "", ""])
        self.patterns = pick(PATTERNS), pick(PATTERNS)
        self.conditions = [one for one in CONDITIONS["t"] if rng.random() < 0.3]
        self.query_conditions = [one for one in CONDITIONS["v"] if rng.random() < 0.2]
        self.pair_conditions = [one for one in BOTH if rng.random() < 0.2]
        self.nulls = rng.random() < 0.3
        self.extra = pick(["", "", ", min(t.loss)", ", count(*)", ", count(DISTINCT v.label)"])
        self.sql = self._sql(pick(JOINS), rng.random() < 0.5, rng.random() < 0.3)

    def _sql(self, join: str, swapped: bool, inside: bool) -> str:
        train = "(SELECT * REPLACE (CASE WHEN sample_id <> 2 THEN gradient END AS gradient) FROM train)"
        left, right = (
            f"layers({alias}.gradient, '{pattern}')" if pattern else f"{alias}.gradient"
            for alias, pattern in zip("tv", self.patterns, strict=True)
        )
        pair = f"{right}, {left}" if swapped else f"{left}, {right}"
        source = (f"{train} t" if self.nulls else "train t") + join.format("validation v")
        given = [sql for sql, _ in (*self.conditions, *self.query_conditions, *self.pair_conditions)]
        where = " WHERE " + " AND ".join(given) if given else ""
        score = f"{self.function}({self.weight}inner_product({pair}))"
        keys = f"{self.key} AS key, " if self.key else ""
        group = f" GROUP BY {self.key}" if self.key else ""
        text = f"SELECT {keys}{score} AS score{self.extra} FROM {source}{where}{group}"
        return f"SELECT * FROM ({text}) ORDER BY ALL" if inside else text

    def expected(self, db: Connection, rows: dict[str, list[Row]]) -> dict[Any, float | None]:
        """Score by key."""
        mask = mask_of(db, self.patterns[0]) * mask_of(db, self.patterns[1])
        groups: dict[Any, list[float]] = {} if self.key else {None: []}
        for t in rows["t"]:
            for v in rows["v"]:
                if not self._passes(t, v):
                    continue
                scores = groups.setdefault(KEYS[self.key](t, v) if self.key else None, [])
                weight = None if v["label"] is None and "v.label" in self.weight else WEIGHTS[self.weight](t, v)
                if weight is not None and not (self.nulls and t["sample_id"] == 2):
                    scores.append(weight * float((t["gradient"] * mask) @ v["gradient"]))
        total: Callable[[list[float]], Any] = np.mean if self.function == "avg" else np.sum
        return {key: float(total(scores)) if scores else None for key, scores in groups.items()}

    def _passes(self, t: Row, v: Row) -> bool:
        return (
            all(test(t) for _, test in self.conditions)
            and all(test(v) for _, test in self.query_conditions)
            and all(test(t, v) for _, test in self.pair_conditions)
        )


def by_key(found: list[tuple[Any, ...]], keyed: bool) -> dict[Any, Any]:
    return {(row[0] if keyed else None): row[1 if keyed else 0] for row in found}


@pytest.mark.parametrize("seed", range(FIRST, FIRST + COUNT))
def test_with_and_without_rules_and_in_numpy(seed: int, db: Connection, rows: dict[str, list[Row]]) -> None:
    query = Query(seed)
    expected = query.expected(db, rows)
    planned = db.sql(query.sql).fetchall()
    assert db._executor is not None
    plain = db._executor.run(query.sql, None, sys._getframe()).fetchall()
    assert len(planned) == len(plain) == len(expected), query.sql
    for found in (by_key(planned, bool(query.key)), by_key(plain, bool(query.key))):
        assert found.keys() == expected.keys(), query.sql
        for key, score in expected.items():
            close = None if score is None else pytest.approx(score, rel=TOLERANCE, abs=TOLERANCE)
            assert found[key] == close, query.sql


def test_many_of_the_queries_are_rewritten(db: Connection) -> None:
    texts = [Query(seed).sql for seed in range(60)]
    assert sum(db._planned(text, sys._getframe()) != text for text in texts) > 20
