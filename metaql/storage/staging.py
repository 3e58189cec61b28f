"""Buffers in which blocks wait to be written: copied once, one after another, into memory that is used again.

The copy is what lets the model reuse its own memory at once; kept alive instead, every batch would touch fresh
pages, which costs more than the copy does. The same pass converts to the stored type and moves from a device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaql.storage.blocks import Factored, Full
from metaql.storage.schema import FULL, Layer

# Untouched pages of a buffer cost nothing, so all have one size and fit any column.
_BUFFER_BYTES = 24 << 20
# What the pool keeps for the next use.
_POOLED_BUFFERS = 8

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Staged:
    """The blocks of some batches: the flat ``suffix`` that layers have in common, and in ``values`` each one's prefix.

    Of a layer in the full layout there is no suffix, and the one value is the flat gradient. ``positions`` is the
    number that every sample has, or None where they differ or have none; ``offsets`` (int64 [samples + 1]) says where
    each one's begin.
    """

    samples: int
    suffix: Tensor | None
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


class Staging:
    """What layers that have their suffixes in common have waiting; one in the full layout is alone."""

    def __init__(self, layers: Sequence[Layer], pool: BufferPool) -> None:
        stored = getattr(torch, layers[0].dtype)
        index = torch.int64 if layers[0].kind == "embedding" else stored
        self._suffix = None if layers[0].layout == FULL else _Column(index, pool)
        self._values = [_Column(stored, pool) for _ in layers]
        self._lengths: list[Array] = []
        self._samples = 0

    @property
    def bytes(self) -> int:
        """How much is waiting."""
        return sum(column.used for column in self._columns)

    @property
    def most(self) -> int:
        """How much of it a layer would have if it had no others beside it, at most."""
        shared = 0 if self._suffix is None else self._suffix.used
        return shared + max(column.used for column in self._values)

    def append(self, blocks: Sequence[Factored | Full], scale: Tensor | None) -> int:
        """Copies the blocks of the layers, each sample's times its ``scale`` [n]; returns the bytes."""
        before = self.bytes
        self._samples += blocks[0].samples
        for column, block in zip(self._values, blocks, strict=True):
            column.append(*_by_sample(block, scale))
        if isinstance(blocks[0], Factored) and self._suffix is not None:
            self._suffix.append(blocks[0].suffix)
            self._lengths.append(_lengths(blocks[0]))
        return self.bytes - before

    def take(self) -> Staged | None:
        """What is waiting, which then no longer is; its values go back with ``release``."""
        if not self._samples:
            return None
        samples, self._samples = self._samples, 0
        lengths, self._lengths = self._lengths, []
        suffix = None if self._suffix is None else self._suffix.take()
        values = tuple(column.take() for column in self._values)
        every = np.concatenate(lengths) if lengths else np.zeros(samples, dtype=np.int64)
        offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(every)])
        common = int(every[0]) if every[0] and (every == every[0]).all() else None
        return Staged(samples, suffix, values, common, offsets)

    @property
    def _columns(self) -> list[_Column]:
        return self._values if self._suffix is None else [self._suffix, *self._values]


class _Column:
    """Values of one type, one tensor after another."""

    def __init__(self, dtype: torch.dtype, pool: BufferPool) -> None:
        self._dtype = dtype
        self._pool = pool
        self._buffer: Tensor | None = None
        self.used = 0

    def append(self, values: Tensor, scale: Tensor | None = None) -> None:
        end = self.used + values.numel() * self._dtype.itemsize
        buffer = self._with_room(end)
        place = buffer[self.used : end].view(self._dtype).view(values.shape)
        if scale is None:
            place.copy_(values)
        elif values.device == place.device:
            torch.mul(values, scale, out=place)
        else:
            place.copy_(values * scale)
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
    for values in staged.values if staged.suffix is None else (staged.suffix, *staged.values):
        pool.give_back(_whole_buffer(values))


def _by_sample(block: Factored | Full, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A block's prefixes or its gradient, and what they are to be multiplied by."""
    values = block.gradient if isinstance(block, Full) else block.prefix
    if scale is None:
        return values, None
    own = scale.to(values)
    if isinstance(block, Full):
        return values, own[:, None]
    if block.offsets is not None:
        return values, own.repeat_interleave(block.offsets.diff())[:, None]
    return values.unflatten(0, (block.samples, len(values) // max(block.samples, 1))), own[:, None, None]


def _whole_buffer(values: Tensor) -> Tensor:
    return torch.tensor([], dtype=torch.uint8).set_(values.untyped_storage())


def _lengths(block: Factored) -> Array:
    """How many positions each sample has, int64 [samples]."""
    if block.offsets is not None:
        lengths: Array = np.diff(block.offsets.cpu().numpy())
        return lengths
    return np.full(block.samples, block.prefix.shape[0] // max(block.samples, 1), dtype=np.int64)
