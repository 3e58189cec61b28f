"""Scores of all pairs in lists, and the best of them, beside a loop over the pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

import metaql
from metaql.udfs import tiles
from metaql.udfs.costs import CONTRACT, FULL, GRAM, Constants
from metaql.udfs.kept_scores import KeptScores
from metaql.udfs.register import session_of

# Whole vectors, parts of them, vectors of another store, averages, NULLs and duplicates in one column.
MIXED = """CASE sample_id % 6
  WHEN 0 THEN gradient WHEN 1 THEN layers(gradient, 'fc1') WHEN 2 THEN NULL
  WHEN 3 THEN (SELECT b.train.gradient FROM b.train WHERE sample_id = 5)
  WHEN 4 THEN (SELECT metaql_mean(list(struct_pack(gradient, weight := 1.0))) FROM a.validation)
  ELSE layers(gradient, 'block.*') END"""


@pytest.fixture
def con(small_store: Path, record_small_store: Callable[..., Path], tmp_path: Path) -> Iterator[Any]:
    """Two stores; a list of gradients of every kind as ``mixed``, and twice as many as ``rows``."""
    connection = duckdb.connect()
    metaql.load(connection, small_store, schema="a")
    metaql.load(connection, record_small_store(tmp_path / "other", seed=1), schema="b")
    connection.execute(f"CREATE TABLE mixed AS SELECT row_number() OVER () AS place, {MIXED} AS g FROM a.train")
    connection.execute("CREATE TABLE rows AS SELECT place + 100 * k AS place, g FROM mixed, range(2) r(k)")
    yield connection
    connection.close()


def plain(con: Any, measure: str) -> dict[tuple[int, int], float | None]:
    """Every pair by its own call: ``test_scoring.py`` compares those with numpy."""
    query = f"SELECT r.place, m.place, {measure}(r.g, m.g) FROM rows r, mixed m ORDER BY hash(r.place * m.place)"
    return {(row, member): score for row, member, score in con.execute(query).fetchall()}


LISTS = """lists AS MATERIALIZED (
  SELECT place % 2 AS odd, metaql_members(list(g ORDER BY place)) AS l, list(place ORDER BY place) AS places
  FROM mixed GROUP BY odd)"""


def scored(con: Any, measure: str, join: str) -> list[tuple[int, int | None, float | None]]:
    """Row, member and score of all rows with the members of the lists that they are joined with."""
    pairs: list[tuple[int, int | None, float | None]] = con.execute(
        f"WITH {LISTS} SELECT r.place, unnest(places), unnest(metaql_scores('{measure}', g, l))"
        f" FROM rows r LEFT JOIN lists {join} ORDER BY hash(r.place)"
    ).fetchall()
    return pairs


@pytest.mark.parametrize("measure", ["inner_product", "cosine_similarity"])
@pytest.mark.parametrize("join", ["ON true", "ON r.place % 2 = odd", "ON r.place % 2 + 1 = odd"])
def test_scores(con: Any, measure: str, join: str) -> None:
    pairs = scored(con, measure, join)
    found = {(row, member): score for row, member, score in pairs if member is not None}
    expected = plain(con, measure)
    if "odd" in join:
        shift = int("+ 1" in join)
        expected = {key: score for key, score in expected.items() if key[0] % 2 + shift == key[1] % 2}
    assert len(found) == sum(member is not None for _, member, _ in pairs)
    assert found.keys() == expected.keys()
    for key, score in expected.items():
        assert found[key] == (None if score is None else pytest.approx(score, rel=1e-6, abs=1e-9))


@pytest.mark.parametrize("way", [GRAM, CONTRACT, FULL])
def test_scores_in_small_pieces(con: Any, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    expected = plain(con, "inner_product")
    monkeypatch.setattr(tiles, "KEPT_BYTES", 64)
    monkeypatch.setattr(tiles, "TILE_BYTES", 96)
    monkeypatch.setattr(tiles, "LAID_OUT_BUDGET", 32)
    monkeypatch.setattr(tiles, "PIECE_SECONDS", 1e-6)
    session_of(con).costs = Constants(forced=frozenset({way}))
    session_of(con).kept_scores = KeptScores()
    found = {(row, member): score for row, member, score in scored(con, "inner_product", "ON true")}
    assert found.keys() == expected.keys()
    for key, score in expected.items():
        assert found[key] == (None if score is None else pytest.approx(score, rel=1e-6, abs=1e-9))


@pytest.mark.parametrize("measure", ["inner_product", "cosine_similarity"])
def test_asked_again(con: Any, measure: str) -> None:
    """The same rows with the same members are not multiplied again; other rows are."""
    counters = session_of(con).counters
    con.execute("SET threads = 1")
    before = counters.now()
    first = {(row, member): score for row, member, score in scored(con, measure, "ON true")}
    asked = counters.now() - before
    again = {(row, member): score for row, member, score in scored(con, measure, "ON true")}
    found = counters.now() - before - asked
    assert again == first
    assert (found.scored, found.found) == (0, asked.scored)
    for row, member, score in scored(con, measure, "ON r.place < 100"):
        if member is not None:
            assert first[row, member] == (None if score is None else pytest.approx(score, rel=1e-5, abs=1e-6))
    assert (counters.now() - before - asked - found).scored > 0


@pytest.mark.parametrize("measure", ["inner_product", "cosine_similarity"])
@pytest.mark.parametrize("side", ["member", "row", "all"])
@pytest.mark.parametrize("k", [1, 3, -2, 50, -1000])
def test_what_is_best_is_among_the_best(con: Any, measure: str, side: str, k: int) -> None:
    pairs = con.execute(
        f"WITH {LISTS}, found AS (SELECT r.place, places, unnest(metaql_best('{measure}', g, l, {k}, '{side}')) AS p"
        " FROM rows r, lists) SELECT place, places[p.member], p.score FROM found"
    ).fetchall()
    found = {(row, member): score for row, member, score in pairs}
    assert len(found) == len(pairs)
    groups: dict[Any, list[Any]] = {}
    for key, score in plain(con, measure).items():
        groups.setdefault({"member": key[1], "row": key[0], "all": None}[side], []).append((key, score))
    for members in groups.values():
        ordered = sorted(members, key=lambda one: (one[1] is None, np.copysign(1, -k) * (one[1] or 0)))
        last = ordered[min(abs(k), len(ordered)) - 1][1]
        # Every one as good as the k-th, so that it does not matter which of several equal ones is asked for.
        for key, score in ordered:
            if last is None or (score is not None and np.sign(k) * score > np.sign(k) * last + 1e-6):
                assert found[key] == (None if score is None else pytest.approx(score, rel=1e-6, abs=1e-9))


def test_best_leaves_most_out(con: Any) -> None:
    kept = con.execute(
        "WITH l AS MATERIALIZED (SELECT metaql_members(list(gradient)) AS l FROM a.validation)"
        " SELECT sum(len(metaql_best('inner_product', gradient, l, 1, 'all'))) FROM a.train, range(300), l"
    ).fetchall()
    # Each sample stands there 300 times, and no two pairs of the small store are both the best.
    assert kept[0][0] < 8 * 5 * 300 / 4


def test_equal_lists_are_one(con: Any) -> None:
    query = "SELECT metaql_members(list(gradient ORDER BY sample_id)) FROM a.train"
    (first,), (second,) = con.execute(f"{query} UNION ALL {query}").fetchall()
    assert first == second
    assert con.execute("SELECT metaql_members(NULL), metaql_members([NULL])").fetchall()[0][0] is None
    assert len(session_of(con).members.get(first)) == 8


@pytest.mark.parametrize(
    "call, message",
    [
        ("metaql_scores('length', gradient, 0)", "'length' is no measure"),
        ("metaql_scores('inner_product', gradient, 99)", "no list of gradients 99"),
        ("metaql_best('inner_product', gradient, 0, 0, 'row')", "a count other than 0"),
        ("metaql_best('inner_product', gradient, 0, 1, 'column')", "one of member, row, all"),
    ],
)
def test_errors(con: Any, call: str, message: str) -> None:
    con.execute("SELECT metaql_members(list(gradient)) FROM a.train").fetchall()
    with pytest.raises(duckdb.InvalidInputException, match=message):
        con.execute(f"SELECT {call} FROM a.train").fetchall()
