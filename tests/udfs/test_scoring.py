"""Scores of references: whichever way a chunk of pairs is cut into products, the loop's numbers come out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metaql.errors import QueryError, ReferenceError, UnknownNameError
from metaql.storage.blocks import Full
from metaql.storage.schema import FULL, Layer, Parameter
from metaql.udfs.definitions import combine
from metaql.udfs.patterns import Space, matches
from metaql.udfs.references import References
from metaql.udfs.scoring import inner_products, squared_norms
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource

ROWS = 40


def references(store: int, rows: Any, patterns: Any = "") -> References:
    rows = np.asarray(rows, dtype=np.int64)
    if isinstance(patterns, str):
        return References(np.full(len(rows), store), rows, None, (patterns,))
    distinct = tuple(dict.fromkeys(patterns))
    codes = np.array([distinct.index(one) for one in patterns], dtype=np.int64)
    return References(np.full(len(rows), store), rows, codes, distinct)


@pytest.fixture
def world(plain: SimpleNamespace, draw: SimpleNamespace, fake_store: Any) -> SimpleNamespace:
    """A session with a store of one layer of each kind, and its laid-out gradients."""
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
    session = Session()
    session.add(StoreSource(fake_store(blocks), "world"))
    gradients = np.concatenate([plain.gradients(layer, block) for layer, block in blocks.items()], axis=1)
    masks = {
        name: np.concatenate([np.full(layer.width, float(layer.name == name)) for layer in blocks]) for name in kinds
    }
    return SimpleNamespace(session=session, gradients=gradients, masks=masks, blocks=blocks, rng=rng)


def pairs_of(rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind == "one query":
        return np.arange(ROWS), np.full(ROWS, 7)
    if kind == "one sample":
        return np.full(ROWS, 7), rng.integers(0, ROWS, ROWS)
    if kind == "all pairs":
        return np.repeat(np.arange(ROWS), ROWS), np.tile(np.arange(ROWS), ROWS)
    if kind == "few queries":
        return rng.permutation(ROWS * 8) % ROWS, rng.integers(0, 3, ROWS * 8)
    if kind == "few samples":
        return rng.integers(0, 3, ROWS * 8), rng.permutation(ROWS * 8) % ROWS
    if kind == "in turn":
        return np.arange(ROWS), np.roll(np.arange(ROWS), 1)
    return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)


@pytest.mark.parametrize(
    "kind", ["one query", "one sample", "all pairs", "few queries", "few samples", "in turn", "none"]
)
@pytest.mark.parametrize("block_bytes", [64 << 20, 200])
def test_inner_products(kind: str, block_bytes: int, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaql.udfs.rows.BLOCK_BYTES", block_bytes)
    left, right = pairs_of(world.rng, kind)
    found = inner_products(world.session, references(7, left), references(7, right))
    expected = (world.gradients[left] * world.gradients[right]).sum(1)
    np.testing.assert_allclose(found, expected, atol=1e-11)


def test_patterns_and_vectors_within_one_chunk(world: SimpleNamespace) -> None:
    rng, session = world.rng, world.session
    weights = rng.standard_normal(ROWS)
    number = session.vectors.add(combine(session, references(7, np.arange(ROWS)), weights))
    mean = weights @ world.gradients
    stores = np.where(np.arange(ROWS) % 3 == 0, session.id, 7)
    left = References(stores, np.where(stores == 7, np.arange(ROWS), number), None, ("",))
    right = references(7, rng.permutation(ROWS), ["a", "b", "c", "d"] * (ROWS // 4))
    vectors = np.where((stores == 7)[:, None], world.gradients, mean)
    masks = np.stack([world.masks["abcd"[k % 4]] for k in range(ROWS)])
    expected = (vectors * masks * world.gradients[right.row]).sum(1)
    np.testing.assert_allclose(inner_products(session, left, right), expected, atol=1e-11)
    np.testing.assert_allclose(squared_norms(session, left), (vectors**2).sum(1), atol=1e-11)


@pytest.mark.parametrize("count", [1, 2, ROWS])
@pytest.mark.parametrize("block_bytes", [64 << 20, 200])
def test_sums_of_references(
    count: int, block_bytes: int, world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few rows stay factors, many are laid out; repeated ones are merged; sums of sums are sums."""
    monkeypatch.setattr("metaql.udfs.rows.BLOCK_BYTES", block_bytes)
    session, rng = world.session, world.rng
    rows, weights = rng.integers(0, count, 2 * count), rng.standard_normal(2 * count)
    patterns = [["", "a", "b & b*"][k % 3] for k in range(2 * count)]
    number = session.vectors.add(combine(session, references(7, rows, patterns), weights))
    expected = sum(
        weight * world.gradients[row] * world.masks.get(pattern[:1], 1)
        for row, weight, pattern in zip(rows, weights, patterns, strict=True)
    )
    again = session.vectors.add(combine(session, references(session.id, [number, number]), np.array([2.0, 0.5])))
    everything = references(7, np.arange(ROWS))
    for vector, factor in ((number, 1), (again, 2.5)):
        scores = inner_products(session, everything, references(session.id, [vector] * ROWS))
        np.testing.assert_allclose(scores, factor * world.gradients @ expected, atol=1e-10)


def test_equal_sums_are_one_vector(world: SimpleNamespace) -> None:
    session = world.session
    one = combine(session, references(7, [1, 2, 3]), np.ones(3))
    same = combine(session, references(7, [3, 1, 2]), np.ones(3))
    other = combine(session, references(7, [3, 1, 2]), np.array([1.0, 1.0, 2.0]))
    assert session.vectors.add(one) == session.vectors.add(same) != session.vectors.add(other)


def test_two_snapshots_of_a_store(world: SimpleNamespace, fake_store: Any, plain: SimpleNamespace) -> None:
    """A row that only the older one still has is found there."""
    layer = Layer("w", "parameter", (Parameter("w", (2,)),), FULL, "float64")
    session = Session()
    old = fake_store({layer: Full(torch.arange(8.0).reshape(4, 2))}, version=1)
    new = fake_store({layer: Full(torch.arange(4.0, 12.0).reshape(4, 2))}, version=2, first=2)
    session.add(StoreSource(old, "old"))
    session.add(StoreSource(new, "new"))
    found = squared_norms(session, references(7, [0, 1, 2, 5, 4]))
    np.testing.assert_array_equal(found, [1, 13, 41, 221, 145])


def test_stores_with_other_layers(fake_store: Any) -> None:
    def layer(name: str, width: int) -> Layer:
        return Layer(name, "parameter", (Parameter(name, (width,)),), FULL, "float64")

    session = Session()
    one = {layer("w", 2): Full(torch.ones(1, 2)), layer("x", 1): Full(torch.ones(1, 1))}
    for number, blocks in (
        (1, one),
        (2, dict(reversed(one.items()))),
        (3, {layer("w", 2): Full(torch.ones(1, 2))}),
        (4, {layer("w", 3): Full(torch.ones(1, 3))}),
    ):
        session.add(StoreSource(fake_store(blocks, store=number), f"run{number}"))
    assert inner_products(session, references(1, [0]), references(2, [0])) == [3]
    assert inner_products(session, references(1, [0], "w"), references(3, [0])) == [2]
    assert inner_products(session, references(3, [0]), references(1, [0], "w")) == [2]
    with pytest.raises(QueryError, match="'x' is recorded in one of the two stores"):
        inner_products(session, references(1, [0]), references(3, [0]))
    with pytest.raises(QueryError, match="'x' is recorded in one of the two stores"):
        inner_products(session, references(3, [0]), references(1, [0]))
    with pytest.raises(QueryError, match=r"'w' has shape \(3,\) in one store and \(2,\)"):
        inner_products(session, references(4, [0]), references(3, [0]))
    with pytest.raises(QueryError, match="'x' is recorded"):
        combine(session, References(np.array([3, 1]), np.array([0, 0]), None, ("",)), np.ones(2))


def test_references_that_lead_nowhere(world: SimpleNamespace) -> None:
    session = world.session
    with pytest.raises(ReferenceError, match=r"belongs to store 8, which is not loaded .*loaded: world \(7\)"):
        squared_norms(session, references(8, [0]))
    with pytest.raises(ReferenceError, match="this connection never made"):
        squared_norms(session, references(session.id, [99]))
    with pytest.raises(ReferenceError, match="this connection never made"):
        squared_norms(session, references(session.id, [-1]))


@pytest.mark.parametrize(
    "glob, names",
    [
        ("fc1", ["fc1.weight", "fc1.bias"]),
        ("fc1.weight", ["fc1.weight"]),
        ("fc?", ["fc1.weight", "fc1.bias", "fc2.weight"]),
        ("*.bias", ["fc1.bias"]),
        ("encoder", ["encoder.0.weight"]),
        ("encoder.*", ["encoder.0.weight"]),
        ("enc*.weight", ["encoder.0.weight"]),
        ("[fs]*", ["fc1.weight", "fc1.bias", "fc2.weight", "scale"]),
        ("scale", ["scale"]),
        ("FC1", []),
        ("weight", []),
    ],
)
def test_patterns(glob: str, names: list[str]) -> None:
    everything = ["fc1.weight", "fc1.bias", "fc2.weight", "encoder.0.weight", "scale"]
    assert [name for name in everything if matches(glob, name)] == names


def test_an_unknown_pattern_lists_what_there_is() -> None:
    space = Space(
        (Layer("fc", "linear", (Parameter("fc.weight", (1, 2)), Parameter("fc.bias", (1,))), FULL, "float32"),)
    )
    assert [one.places for one in space.select("fc.bias")] == [(1,)]
    assert space.select("fc.bias & fc.weight") == ()
    with pytest.raises(UnknownNameError, match=r"'cf'. Recorded are: fc\.weight, fc\.bias"):
        space.select("fc & cf")
