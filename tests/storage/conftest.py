"""Layers of every kind, blocks of random gradients for them, and small stores to read, damage and drop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from metaql.storage.blocks import Block, Factored, Full, whole
from metaql.storage.schema import FACTORED, FULL, Layer, Parameter, Unfold, parts
from metaql.storage.writer import Writer

_UNFOLD = Unfold((4, 5, 6), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))


def _layer(name: str, kind: str, shape: tuple[int, ...], dtype: str, **rest: object) -> Layer:
    weight = Parameter(f"{name}.weight", shape)
    parameters = (weight, Parameter(f"{name}.bias", shape[:1])) if kind in ("linear", "conv") else (weight,)
    layout = FACTORED if kind in ("linear", "conv", "embedding", "tied") else FULL
    return Layer(name, kind, parameters, layout, dtype, **rest)  # type: ignore[arg-type]


def _layers(dtype: str) -> tuple[Layer, ...]:
    return (
        _layer("vector", "linear", (3, 7), dtype, input_width=7, output_width=3, positions=1),
        _layer("sequence", "linear", (4, 5), dtype, input_width=5, output_width=4, positions=6),
        _layer("ragged", "linear", (4, 5), dtype, input_width=5, output_width=4),
        _layer("table", "embedding", (11, 4), dtype, input_width=11, output_width=4),
        _layer("grouped", "conv", (6, 4, 1), dtype, groups=2, input_width=4, output_width=6, positions=5),
        _layer("image", "conv", (6, 2, 3, 3), dtype, groups=2, input_width=18, output_width=6, positions=30,
               unfold=_UNFOLD),
        _layer("scale", "norm", (9,), dtype),
        _layer("shared", "tied", (8, 3), dtype, input_width=3, output_width=8, positions=2),
    )  # fmt: skip


def _block(layer: Layer, samples: int, generator: torch.Generator, zeros: float) -> Block:
    """Random gradients; about ``zeros`` of the positions have a zero prefix."""
    dtype = getattr(torch, layer.dtype)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    if layer.layout == FULL:
        return Full(values(samples, layer.width))
    if layer.kind == "tied":
        return whole([_block(part, samples, generator, zeros) for part in parts(layer)])
    assert layer.output_width is not None
    assert layer.input_width is not None
    offsets = None
    positions = samples * (layer.positions or 3)
    if layer.positions is None and torch.rand((), generator=generator) < 0.8:
        lengths = torch.randint(0, 9, (samples,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        positions = int(offsets[-1])
    prefix = values(positions, layer.output_width)
    prefix[torch.rand(positions, generator=generator) < zeros] = 0
    if layer.kind == "embedding":
        suffix = torch.randint(0, layer.input_width, (positions,), generator=generator)
    elif layer.unfold is not None:
        suffix = values(samples, prod(layer.unfold.input_shape))
    else:
        suffix = values(positions, layer.groups * layer.input_width)
    return Factored(suffix, prefix, samples, offsets)


def _record(path: Path, checkpoints: int = 2, rows: int = 40) -> Path:
    layers = _layers("float32")
    generator = torch.Generator().manual_seed(0)
    with Writer.open(path) as writer:
        writer.define("Net", layers, "float32")
        for _ in range(checkpoints):
            number = writer.add_checkpoint({"w": torch.ones(3)}, "digest", 10, {"learning_rate": 0.1})
            for split in ("train", "validation"):
                collection = writer.collection(split, number)
                blocks = {layer.name: _block(layer, rows, generator, 0.2) for layer in layers}
                collection.append(np.arange(rows), blocks, np.ones(rows), inputs=torch.ones(rows, 2, 3))
                collection.finish(pa.table({"sample_id": np.arange(rows), "label": np.arange(rows) % 10}))
    return path


@pytest.fixture
def make_layers() -> Callable[[str], tuple[Layer, ...]]:
    """Gives one layer of each kind and form in a dtype."""
    return _layers


@pytest.fixture
def make_block() -> Callable[[Layer, int, torch.Generator, float], Block]:
    """Gives random gradients of a layer."""
    return _block


@pytest.fixture
def record() -> Callable[..., Path]:
    """Records two checkpoints with a train and a validation collection of 40 rows each."""
    return _record


@pytest.fixture(scope="session")
def recorded_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``record`` records; don't write to it."""
    return _record(tmp_path_factory.mktemp("recorded") / "store")


@pytest.fixture
def store_path(tmp_path: Path, recorded_once: Path) -> Path:
    """A small store of one's own."""
    return shutil.copytree(recorded_once, tmp_path / "store")
