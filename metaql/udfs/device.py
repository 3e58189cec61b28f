"""A store's record batches in a device's memory, the least recently used dropped first."""

from __future__ import annotations

import numpy as np
import torch

from metaql.errors import QueryError
from metaql.storage.blocks import Block, Factored, Full, size, whole
from metaql.storage.cache import Cache
from metaql.storage.schema import Layer, stored_parts
from metaql.storage.store import Store
from metaql.udfs.references import Ints
from metaql.udfs.slices import move

# The rest of a device's free memory is for what is computed.
SHARE = 0.5


class DeviceBlocks:
    """Blocks of a store on a device; at most ``capacity`` bytes of them stay there between two reads."""

    def __init__(self, store: Store, device: torch.device, capacity: int) -> None:
        self._store, self.device, self._capacity = store, device, capacity
        self._cache: Cache[tuple[str, int], Block] = Cache(capacity)

    @property
    def used(self) -> int:
        """The bytes that stay there now."""
        return self._cache.used

    def read(self, layer: Layer, rows: Ints) -> Block:
        """The rows as the store has them, on the device; whole record batches are copied when rows follow in one."""
        return whole([self._read(part, rows) for part in stored_parts(layer)])

    def _read(self, layer: Layer, rows: Ints) -> Block:
        if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            begin, end = self._store.batch(layer, int(rows[0]))
            fits = (end - begin) * self._store.row_bytes(layer) <= self._capacity
            if rows[-1] < end and fits:
                return _part(self._batch(layer, begin, end), int(rows[0]) - begin, len(rows))
        return move(self._store.read(layer, rows), self.device)

    def _batch(self, layer: Layer, begin: int, end: int) -> Block:
        found = self._cache.get((layer.name, begin))
        if found is None:
            found = self._copied(self._store.read(layer, np.arange(begin, end)))
            self._cache.put((layer.name, begin), found, size(found))
        return found

    def _copied(self, block: Block) -> Block:
        """The block in the device's memory, by way of pages that it can fetch by itself."""
        if isinstance(block, Full):
            return Full(self._sent(block.gradient))
        return block.each(self._copied_factors)

    def _copied_factors(self, block: Factored) -> Factored:
        offsets = None if block.offsets is None else self._sent(block.offsets)
        return Factored(self._sent(block.suffix), self._sent(block.prefix), block.samples, offsets)

    def _sent(self, values: torch.Tensor) -> torch.Tensor:
        pinned = values.pin_memory() if self.device.type == "cuda" else values
        return pinned.to(self.device)


def device_of(name: str | torch.device | None) -> torch.device | None:
    """The device of this name, which is there; None for the processor. QueryError when it is not."""
    if name is None:
        return None
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise QueryError(
            f"device={str(name)!r} can't be used with torch {torch.__version__} on this machine ({reason}): install a"
            " build of torch for it, with its driver, or leave device out and scores are computed on the processor"
        ) from None
    return None if device.type == "cpu" else device


def free_bytes(device: torch.device) -> int:
    """How much of a device's memory may hold record batches."""
    if device.type == "cuda":
        return int(SHARE * torch.cuda.mem_get_info(device)[0])
    # Devices that share the processor's memory gain nothing from a copy that stays.
    return 0


def _part(block: Block, first: int, count: int) -> Block:
    """Some of a stored block's samples; the suffix of one with ``unfold`` has a row a sample, not a position."""
    if isinstance(block, Full):
        return Full(block.gradient[first : first + count])
    return block.each(lambda one: _part_of_factors(one, first, count))


def _part_of_factors(block: Factored, first: int, count: int) -> Factored:
    if block.offsets is not None:
        offsets = block.offsets[first : first + count + 1]
        begin, end = int(offsets[0]), int(offsets[-1])
        return Factored(block.suffix[begin:end], block.prefix[begin:end], count, offsets - begin)
    suffix, prefix = (
        values.narrow(0, first * each, count * each)
        for values in (block.suffix, block.prefix)
        for each in (len(values) // block.samples,)
    )
    return Factored(suffix, prefix, count)
