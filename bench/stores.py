"""Stores of random factors, as large as a benchmark asks, and the same numbers as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metaql.storage.blocks import Factored
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.storage.store import Store
from metaql.storage.writer import Writer

_TOGETHER = 1024


def linear(name: str, inside: int, outside: int, positions: int = 1, dtype: str = "float32") -> Layer:
    """A linear layer without a bias, kept in factors."""
    weight = Parameter(f"{name}.weight", (outside, inside))
    return Layer(name, "linear", (weight,), FACTORED, dtype, 1, inside, outside, positions)


def fill(path: Path, layers: Sequence[Layer], splits: Mapping[str, int], checkpoints: int = 1) -> None:
    """Writes a store with so many rows of each split at each checkpoint, of normally distributed factors."""
    with Writer.open(path) as writer:
        writer.define("bench", tuple(layers), "float32")
        for number in range(checkpoints):
            settings = {"learning_rate": 0.1 / (number + 1)}
            checkpoint = writer.add_checkpoint({"weight": torch.ones(1)}, f"{number}", number, settings)
            for split, rows in splits.items():
                collection = writer.collection(split, checkpoint)
                for begin in range(0, rows, _TOGETHER):
                    count = min(_TOGETHER, rows - begin)
                    blocks = {layer.name: random_factors(layer, count) for layer in layers}
                    collection.append(np.arange(begin, begin + count), blocks, np.zeros(count))
                collection.finish()


def random_factors(layer: Layer, samples: int) -> Factored:
    """Of normally distributed numbers."""
    positions = samples * (layer.positions or 1)
    suffix = torch.randn(positions, layer.groups * (layer.input_width or 0))
    return Factored(suffix, torch.randn(positions, layer.output_width or 0), samples)


def mapped(store: Store, layer: Layer, begin: int, end: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Suffixes [n, s, i] and prefixes [n, s, o] of these rows, record batch by record batch: views of the file."""
    while begin < end:
        count = min(store.together(layer, begin), end - begin)
        block = store.read(layer, np.arange(begin, begin + count))
        assert isinstance(block, Factored)
        yield block.suffix.unflatten(0, (count, -1)), block.prefix.unflatten(0, (count, -1))
        begin += count


def layer_bytes(store: Store, layer: str) -> int:
    """What a layer's segments take on the disk."""
    segments = (one for each in store.manifest.collections for one in each.segments)
    return sum(one.file.bytes for one in segments if one.layer == layer)
