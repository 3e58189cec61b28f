"""A model that replays samples: from an input and a target in SQL to the blocks of their gradient."""

from __future__ import annotations

import threading
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from metaql.errors import QueryError
from metaql.storage.blocks import Block, Factored, rows
from metaql.udfs.slices import move
from metaql.udfs.sources import StoreSource


class Replay(Protocol):
    """Computes the gradients of samples anew (metaql.storage.replay has the one that is used)."""

    def gradient(self, inputs: Tensor, targets: Tensor) -> dict[str, Block]:
        """Every recorded layer's block, by its name, for inputs [n, …] and targets [n]."""


class Model:
    """A replay for one store. Calls wait for one another: a pass changes the model's state while it runs."""

    def __init__(self, replay: Replay, source: StoreSource) -> None:
        self.source = source
        self._replay = replay
        self._lock = threading.Lock()

    def prepare(self, numbers: np.ndarray) -> bytes:
        """The input as the bytes that ``gradient`` takes; QueryError when their number is wrong."""
        shape, _ = self._shape_and_dtype(len(numbers))
        if int(np.prod(shape)) != len(numbers):
            raise QueryError(
                f"gradient(input, target): the input has {len(numbers)} numbers, and the inputs that were recorded"
                f" in {self.source.name} have {int(np.prod(shape))} (shape {tuple(shape)})"
            )
        return numbers.astype(np.float64).tobytes()

    def gradient(self, prepared: bytes, target: int) -> dict[str, Block]:
        """Every layer's unfolded block of this one sample."""
        numbers = np.frombuffer(prepared, dtype=np.float64).copy()
        shape, dtype = self._shape_and_dtype(len(numbers))
        inputs = torch.from_numpy(numbers).to(dtype).reshape(1, *shape)
        with self._lock:
            blocks = self._replay.gradient(inputs, torch.tensor([target]))
        return {layer.name: self._unfolded(blocks[layer.name], layer.name) for layer in self.source.space.layers}

    def _unfolded(self, block: Block, name: str) -> Block:
        block = move(block, self.source.device or torch.device("cpu"))
        return rows(self.source.store.layer(name), block) if isinstance(block, Factored) else block

    def _shape_and_dtype(self, count: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a sample's input: as recorded with inputs=True, else a plain vector of floats."""
        for collection in reversed(self.source.store.manifest.collections):
            if collection.inputs is not None:
                return tuple(collection.inputs.shape), getattr(torch, collection.inputs.dtype)
        return (count,), torch.float64 if self.source.store.manifest.dtype == "float64" else torch.float32
