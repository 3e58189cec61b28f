"""Random layers and gradients, and a second implementation of every score: a loop over samples in numpy."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metaql.storage.blocks import Block, Factored, Factors, Full, Tied, split, whole
from metaql.storage.schema import FACTORED, FULL, Layer, Parameter, parts


def random_layer(rng: np.random.Generator, kind: str, name: str = "fc") -> Layer:
    """A layer of small random widths; a linear one or a convolution may lack its bias."""
    if kind == "norm":
        return Layer(name, kind, (Parameter(f"{name}.weight", (int(rng.integers(1, 9)),)),), FULL, "float64")
    i, o = int(rng.integers(1, 9)), int(rng.integers(1, 5))
    groups = int(rng.integers(2, 4)) if kind == "conv" else 1
    o *= groups
    if kind == "embedding":
        return Layer(name, kind, (Parameter(f"{name}.weight", (i, o)),), FACTORED, "float64", 1, i, o)
    if kind == "tied":
        return Layer(name, kind, (Parameter(f"{name}.weight", (o, i)),), FACTORED, "float64", 1, i, o, 2, None, 3)
    parameters = [Parameter(f"{name}.weight", (o, i)), Parameter(f"{name}.bias", (o,))]
    kept = tuple(parameters[: int(rng.integers(1, 3))])
    return Layer(name, kind, kept, FACTORED, "float64", groups, i, o)


def random_factors(rng: np.random.Generator, layer: Layer, samples: int, form: str) -> Factors:
    """Factors of so many samples, with the same number of positions each or, ``ragged``, with 0 to 4."""
    if layer.kind == "tied":
        found = whole([random_factors(rng, part, samples, form) for part in parts(layer)])
        assert isinstance(found, Tied)
        return found
    lengths = np.full(samples, int(rng.integers(1, 5)))
    if form == "ragged":
        lengths = rng.integers(0, 5, samples)
    count = int(lengths.sum())
    prefix = torch.from_numpy(rng.standard_normal((count, layer.output_width or 0)))
    if layer.kind == "embedding":
        suffix = torch.from_numpy(rng.integers(0, layer.input_width or 0, count))
    else:
        suffix = torch.from_numpy(rng.standard_normal((count, layer.groups * (layer.input_width or 0))))
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()])) if form == "ragged" else None
    return Factored(suffix, prefix, samples, offsets)


def gradients(layer: Layer, block: Block) -> np.ndarray:
    """Every sample's gradient, one position after another: [n, layer.width] in float64."""
    if isinstance(block, Full):
        return block.gradient.double().numpy()
    if isinstance(block, Tied):
        return np.sum([gradients(part, one) for part, one in split(layer, block)], axis=0)
    result = np.zeros((block.samples, layer.width))
    each = len(block.prefix) // max(block.samples, 1)
    offsets = [k * each for k in range(block.samples + 1)] if block.offsets is None else block.offsets.tolist()
    for sample in range(block.samples):
        for position in range(offsets[sample], offsets[sample + 1]):
            result[sample] += _of_position(layer, block.suffix[position], block.prefix[position].double().numpy())
    return result


def _of_position(layer: Layer, suffix: torch.Tensor, prefix: np.ndarray) -> np.ndarray:
    weight = np.zeros(layer.parameters[0].shape)
    if layer.kind == "embedding":
        weight[int(suffix)] = prefix
    else:
        each = len(prefix) // layer.groups
        values = suffix.double().numpy().reshape(layer.groups, -1)
        for channel, value in enumerate(prefix):
            weight[channel] = value * values[channel // each]
    return np.concatenate([weight.ravel(), prefix if layer.has_bias else []])


def selected(layer: Layer, places: tuple[int, ...]) -> np.ndarray:
    """1 in the columns of these parameters, 0 elsewhere."""
    return np.concatenate(
        [np.full(parameter.width, float(place in places)) for place, parameter in enumerate(layer.parameters)]
    )


def random_block(rng: np.random.Generator, layer: Layer, samples: int, form: str) -> Block:
    """Factors in a form, or laid-out gradients."""
    if form == "full" or layer.input_width is None:
        return Full(torch.from_numpy(rng.standard_normal((samples, layer.width))))
    return random_factors(rng, layer, samples, form)


@pytest.fixture
def plain() -> SimpleNamespace:
    """The slow, plain implementation."""
    return SimpleNamespace(gradients=gradients, selected=selected)


@pytest.fixture
def draw() -> SimpleNamespace:
    """Random layers and blocks."""
    return SimpleNamespace(layer=random_layer, block=random_block, factors=random_factors)


class FakeStore:
    """A store in memory: one block a layer, rows from 0."""

    def __init__(self, blocks: dict[Layer, Block], store: int = 7, version: int = 1, first: int = 0) -> None:
        self.layers = tuple(blocks)
        self.id, self.version, self.first = store, version, first
        self.manifest = SimpleNamespace(collections=(), dtype="float64")
        self._blocks = {layer.name: block for layer, block in blocks.items()}
        self.rows = next(iter(blocks.values())).samples

    def layer(self, name: str) -> Layer:
        return next(layer for layer in self.layers if layer.name == name)

    def read(self, layer: Layer, rows: np.ndarray) -> Block:
        from metaql.udfs.slices import take

        assert rows.dtype == np.int64
        return take(self._blocks[layer.name], torch.from_numpy(rows - self.first))

    def has_rows(self, rows: np.ndarray) -> bool:
        return bool(((rows >= self.first) & (rows < self.first + self.rows)).all())

    def row_bytes(self, layer: Layer) -> int:
        return 64

    def stretch(self, row: int) -> tuple[int, int]:
        return (self.first, self.first + self.rows) if self.has_rows(np.array([row])) else (row, row)

    def together(self, layer: Layer, row: int) -> int:
        """As if a record batch ended after every seven rows."""
        return min(7 - (row - self.first) % 7, self.first + self.rows - row)


@pytest.fixture
def fake_store() -> Any:
    """Stores in memory."""
    return FakeStore


@pytest.fixture
def float32() -> Any:
    """The layer, and its block, in float32."""
    return lambda layer: replace(layer, dtype="float32")
