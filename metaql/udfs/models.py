"""A model that replays samples: from an input and a target in SQL to the blocks of their gradient."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from metaql.errors import QueryError
from metaql.methods.hessian import Hessian
from metaql.methods.solvers import CG, LISSA, Eigenpairs, arnoldi, cg, eigenpairs, lissa
from metaql.storage.blocks import Block, Factored, rows
from metaql.udfs.slices import move
from metaql.udfs.sources import StoreSource


class Replay(Protocol):
    """Computes the gradients of samples anew (metaql.storage.replay has the one that is used)."""

    def gradient(self, inputs: Tensor, targets: Tensor) -> dict[str, Block]:
        """Every recorded layer's block, by its name, for inputs [n, …] and targets [n]."""

    @property
    def checkpoint(self) -> int:
        """Whose weights it has."""

    def hessian(self, between: Callable[[], None]) -> Hessian:
        """That of the mean loss over the training samples, over the layers' laid-out gradients one after another."""


class Model:
    """A replay for one store. Calls wait for one another: a pass changes the model's state while it runs."""

    def __init__(self, replay: Replay, source: StoreSource) -> None:
        self.source = source
        self._replay = replay
        self._lock = threading.Lock()
        self._hessian: Hessian | None = None
        self._largest: Eigenpairs | None = None

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

    @property
    def checkpoint(self) -> int:
        """Whose weights it has."""
        return self._replay.checkpoint

    def solve(self, method: str, vector: Tensor, damping: float, go_on: Callable[[], None]) -> Tensor:
        """(H + damping)⁻¹ v, H being the training loss' Hessian and v the layers' laid-out gradients; float64.

        ``go_on`` is the session's, which raises when nothing shall go on.
        """
        with self._lock:
            self._hessian = self._hessian or self._replay.hessian(go_on)
            if method == CG:
                return cg(self._hessian, vector.double(), damping)
            if method == LISSA:
                return lissa(self._hessian, vector.double(), damping)
            # They take all the time, and serve for every vector.
            self._largest = self._largest or eigenpairs(self._hessian, len(vector), torch.float64)
            return arnoldi(self._hessian, vector.double(), damping, self._largest)

    def _unfolded(self, block: Block, name: str) -> Block:
        block = move(block, self.source.device or torch.device("cpu"))
        return rows(self.source.store.layer(name), block) if isinstance(block, Factored) else block

    def _shape_and_dtype(self, count: int) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a sample's input: as recorded with inputs=True, else a plain vector of floats."""
        for collection in reversed(self.source.store.manifest.collections):
            if collection.inputs is not None:
                return tuple(collection.inputs.shape), getattr(torch, collection.inputs.dtype)
        return (count,), torch.float64 if self.source.store.manifest.dtype == "float64" else torch.float32
