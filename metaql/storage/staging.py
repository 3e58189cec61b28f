"""Buffers in which blocks wait to be written: copied once, one after another, into memory that is used again.

The copy is what lets the model reuse its own memory at once; kept alive instead, every batch would touch fresh
pages, which costs more than the copy does. The same pass converts to the stored type and moves from a device.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaql.storage.blocks import Factored, Full
from metaql.storage.schema import Layer

# Untouched pages of a buffer cost nothing, so all have one size and fit any column.
_BUFFER_BYTES = 24 << 20
# What the pool keeps for the next use.
_POOLED_BUFFERS = 8

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Staged:
    """The blocks of some batches: ``values`` are the flat suffix and prefix, or the flat gradient alone.

    ``positions`` is the number that every sample has, or None where they differ or have none; ``offsets`` (int64
    [samples + 1]) says where each one's begin.
    """

    samples: int
    values: tuple[Tensor, ...]
    positions: int | None
    offsets: Array


class BufferPool:
    """Lends buffers of bytes, and takes some of them back for the next."""

    def __init__(self) -> None:
        # Without a lock: the training's thread, which may be interrupted, and the writing one come here.
        self._free: deque[Tensor] = deque(maxlen=_POOLED_BUFFERS)

    def lend(self, size: int) -> Tensor:
        """A buffer of at least so many bytes, with anything in it."""
        if size <= _BUFFER_BYTES:
            with suppress(IndexError):
                return self._free.pop()
        return torch.empty(max(size, _BUFFER_BYTES), dtype=torch.uint8)

    def give_back(self, buffer: Tensor) -> None:
        """Takes a lent buffer, which nobody may read any more."""
        if len(buffer) == _BUFFER_BYTES:
            self._free.append(buffer)


class LayerStaging:
    """What one layer has waiting."""

    def __init__(self, layer: Layer, pool: BufferPool) -> None:
        stored = getattr(torch, layer.dtype)
        index = torch.int64 if layer.kind == "embedding" else stored
        types = {"gradient": stored, "suffix": index, "prefix": stored}
        self._columns = {name: _Column(dtype, pool) for name, dtype in types.items()}
        self._lengths: list[Array] = []
        self._samples = 0

    @property
    def bytes(self) -> int:
        """How much is waiting."""
        return sum(column.used for column in self._columns.values())

    def append(self, block: Factored | Full) -> int:
        """Copies the block; returns its bytes."""
        before = self.bytes
        self._samples += block.samples
        if isinstance(block, Full):
            self._columns["gradient"].append(block.gradient)
        else:
            self._columns["suffix"].append(block.suffix)
            self._columns["prefix"].append(block.prefix)
            self._lengths.append(_lengths(block))
        return self.bytes - before

    def take(self) -> Staged | None:
        """What is waiting, which then no longer is; its values go back with ``release``."""
        if not self._samples:
            return None
        samples, self._samples = self._samples, 0
        lengths, self._lengths = self._lengths, []
        values = tuple(column.take() for column in self._columns.values() if column.lent)
        every = np.concatenate(lengths) if lengths else np.zeros(samples, dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(every)])
        common = int(every[0]) if every[0] and (every == every[0]).all() else None
        return Staged(samples, values, common, offsets)


class _Column:
    """Values of one type, one tensor after another."""

    def __init__(self, dtype: torch.dtype, pool: BufferPool) -> None:
        self._dtype = dtype
        self._pool = pool
        self._buffer: Tensor | None = None
        self.used = 0

    @property
    def lent(self) -> bool:
        """Whether anything was appended, be it of no length."""
        return self._buffer is not None

    def append(self, values: Tensor) -> None:
        end = self.used + values.numel() * self._dtype.itemsize
        buffer = self._with_room(end)
        place = buffer[self.used : end].view(self._dtype).view(values.shape)
        place.copy_(values)
        self.used = end

    def take(self) -> Tensor:
        assert self._buffer is not None
        filled, self._buffer, self.used = self._buffer[: self.used].view(self._dtype), None, 0
        return filled

    def _with_room(self, size: int) -> Tensor:
        if self._buffer is None:
            self._buffer = self._pool.lend(size)
        elif size > len(self._buffer):
            larger = self._pool.lend(2 * size)
            larger[: self.used] = self._buffer[: self.used]
            self._pool.give_back(self._buffer)
            self._buffer = larger
        return self._buffer


def release(staged: Staged, pool: BufferPool) -> None:
    """Gives the buffers behind staged values back to the pool."""
    for values in staged.values:
        pool.give_back(_whole_buffer(values))


def _whole_buffer(values: Tensor) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(values.untyped_storage())


def _lengths(block: Factored) -> Array:
    """How many positions each sample has, int64 [samples]."""
    if block.offsets is not None:
        lengths: Array = np.diff(block.offsets.cpu().numpy())
        return lengths
    return np.full(block.samples, block.prefix.shape[0] // max(block.samples, 1), dtype=np.int64)
