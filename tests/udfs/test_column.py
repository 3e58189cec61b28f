"""Rows against one vector: whether whole blocks are scored or single rows, the loop's numbers come out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pytest
import torch

import metaql
from metaql.storage.blocks import Factored, Full
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.storage.store import Store
from metaql.udfs.costs import CONTRACT, FULL, GRAM, PROBE, SCAN, Constants, Side
from metaql.udfs.definitions import combine
from metaql.udfs.kept_scores import KeptScores
from metaql.udfs.references import References
from metaql.udfs.scoring import inner_products
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource

ROWS, CALL = 60, 8
WAYS = [(), *((kernel, rows) for kernel in (GRAM, CONTRACT, FULL) for rows in (SCAN, PROBE))]


def references(store: int, rows: Any) -> References:
    rows = np.asarray(rows, dtype=np.int64)
    return References(np.full(len(rows), store), rows, None, ("",))


@pytest.fixture
def world(
    plain: SimpleNamespace, draw: SimpleNamespace, fake_store: Any, monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """A store of one layer of each kind, in calls of 8 rows and blocks of 16 to 32."""
    monkeypatch.setattr("metaql.udfs.column.CALL_ROWS", CALL)
    monkeypatch.setattr("metaql.udfs.column.LARGEST_BLOCK", 4 * CALL)
    rng = np.random.default_rng(0)
    kinds = {
        "a": ("linear", "ragged"),
        "b": ("conv", "fixed"),
        "c": ("embedding", "ragged"),
        "d": ("norm", "full"),
        "e": ("tied", "ragged"),
    }
    blocks = {}
    for name, (kind, form) in kinds.items():
        layer = draw.layer(rng, kind, name)
        blocks[layer] = draw.block(rng, layer, ROWS, form)
    gradients = np.concatenate([plain.gradients(layer, block) for layer, block in blocks.items()], axis=1)
    weights = rng.standard_normal(5)

    def session(costs: Constants) -> tuple[Session, int]:
        made = Session()
        made.costs = costs
        made.add(StoreSource(fake_store(blocks, first=100), "world"))
        return made, made.vectors.add(combine(made, references(7, np.arange(103, 108)), weights))

    return SimpleNamespace(session=session, scores=gradients @ (weights @ gradients[3:8]), rng=rng)


def calls(world: SimpleNamespace, order: str, share: float) -> list[np.ndarray]:
    """Rows that a filter leaves, as DuckDB may hand them over."""
    rows = np.flatnonzero(world.rng.random(ROWS) < share)
    if order == "sorted first":
        return np.split(rows, range(CALL, len(rows), CALL))
    if order == "in no order":
        return np.split(world.rng.permutation(rows), range(CALL, len(rows), CALL))
    if order == "with repetitions":
        return [world.rng.choice(np.append(rows, 0), CALL) for _ in range(6)]
    return [rows[rows // CALL == call] for call in range(ROWS // CALL + 1)]


@pytest.mark.parametrize("ways", WAYS, ids=lambda ways: " ".join(ways) or "chosen")
@pytest.mark.parametrize("order", ["in order", "sorted first", "in no order", "with repetitions"])
def test_scores_equal_the_loop(ways: tuple[str, ...], order: str, world: SimpleNamespace) -> None:
    for share, expected in ((0.1, None), (0.1, 1e9), (1.0, None), (1.0, 1.0)):
        session, number = world.session(Constants(forced=frozenset(ways)))
        asked = 0
        for rows in calls(world, order, share) + calls(world, order, share):
            vector = references(session.id, np.full(len(rows), number))
            found = inner_products(session, references(7, rows + 100), vector, expected)
            np.testing.assert_allclose(found, world.scores[rows], atol=1e-10)
            asked += len(rows)
        counts = session.counters.now()
        assert counts.scored + counts.found >= asked
        if PROBE in ways:
            assert (counts.scored, counts.found) == (asked, 0)


def test_a_scan_scores_every_row_once_and_a_repeated_one_none(world: SimpleNamespace) -> None:
    session, number = world.session(Constants(forced=frozenset({SCAN})))
    for scored in (ROWS, 0):
        before = session.counters.now()
        for rows in calls(world, "in order", 1.0):
            inner_products(session, references(7, rows + 100), references(session.id, np.full(len(rows), number)))
        counts = session.counters.now() - before
        assert counts.scored == scored
        assert (counts.seconds > 0) == bool(scored)
    assert counts.found == ROWS


def test_scores_that_the_cache_has_dropped_are_computed_again(world: SimpleNamespace) -> None:
    session, number = world.session(Constants(forced=frozenset({SCAN})))
    session.kept_scores = KeptScores(cache_bytes=8 * 4 * CALL)
    for _ in range(2):
        for rows in calls(world, "in order", 1.0):
            vector = references(session.id, np.full(len(rows), number))
            found = inner_products(session, references(7, rows + 100), vector)
            np.testing.assert_allclose(found, world.scores[rows], atol=1e-10)
    assert session.counters.now().scored == 2 * ROWS


def test_single_rows_are_scored_until_they_have_cost_as_much_as_their_block(world: SimpleNamespace) -> None:
    """One row a call where a row costs a second and a call next to nothing."""
    session, number = world.session(Constants(stream=1.0, load=1.0, flop=1e-9, result=1e-9, row=1e-9, call=1e-9))
    for _ in range(3 * ROWS):
        inner_products(session, references(7, [100]), references(session.id, [number]))
    counts = session.counters.now()
    assert CALL < counts.scored <= 3 * 4 * CALL
    assert counts.found > ROWS


WIDE = Layer("fc", "linear", (Parameter("fc.weight", (256, 256)),), FACTORED, "float32", 1, 256, 256, 1)


@pytest.mark.parametrize(
    "query_rows, asked, expected, form",
    [
        (2, 10, 10, Factored),  # few factors
        (2, 2000, 1e6, Factored),  # for as many rows as you like
        (500, 2, 2, Factored),  # few rows
        (500, 2, 1e6, Factored),  # many rows, so it is said
        (500, 400, 1e6, Full),  # and so it seems
        (500, 2000, 2000, Full),  # many rows
    ],
)
def test_a_sum_is_laid_out_where_that_pays(
    query_rows: int, asked: int, expected: float, form: type, fake_store: Any
) -> None:
    session = Session()
    block = Factored(torch.randn(query_rows, 256), torch.randn(query_rows, 256), query_rows)
    session.add(StoreSource(fake_store({WIDE: block}), "world"))
    number = session.vectors.add(combine(session, references(7, range(query_rows)), np.ones(query_rows)))
    assert isinstance(session.vectors.against(number, WIDE, Side(asked, 1), expected), form)


def test_factors_are_laid_out_once_they_have_cost_as_much(fake_store: Any) -> None:
    session = Session()
    block = Factored(torch.randn(500, 256), torch.randn(500, 256), 500)
    session.add(StoreSource(fake_store({WIDE: block}), "world"))
    number = session.vectors.add(combine(session, references(7, range(500)), np.ones(500)))
    forms = [type(session.vectors.against(number, WIDE, Side(20, 1), 20)) for _ in range(40)]
    assert forms[0] is Factored
    assert forms[-1] is Full
    assert forms == sorted(forms, key=lambda form: form is Full)


def test_rows_of_several_collections(small_store: Path, small_gradients: np.ndarray) -> None:
    session = Session()
    session.add(StoreSource(Store.open(small_store), "small"))
    rows = np.random.default_rng(1).permutation(len(small_gradients))
    store = Store.open(small_store).id
    for one in (0, len(rows) - 1):
        found = inner_products(session, references(store, rows), references(store, np.full(len(rows), one)))
        np.testing.assert_array_equal(found, small_gradients[rows] @ small_gradients[one])


@pytest.mark.parametrize("hint", ["NULL", "1", "1e12", "0"])
def test_a_hint_changes_no_score(hint: str, small_store: Path) -> None:
    with duckdb.connect() as connection:
        metaql.load(connection, small_store)
        query = (
            "SELECT inner_product(t.gradient, v.gradient), metaql_score(t.gradient, v.gradient, {})"
            " FROM metaql.train t, metaql.validation v ORDER BY t.sample_id, v.sample_id"
        )
        for score, hinted in connection.execute(query.format(hint)).fetchall():
            assert score == hinted


def test_costs_are_those_of_the_positions_that_are_kept(small_store: Path) -> None:
    store = Store.open(small_store)
    space, rows = StoreSource(store, "small").space, np.arange(store.manifest.next_row)
    for layer in space.layers:
        block = store.read(store.layer(layer.name), rows)
        if isinstance(block, Factored):
            assert layer.positions == max(round(len(block.prefix) / len(rows)), 1)
