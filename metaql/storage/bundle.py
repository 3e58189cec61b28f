"""Layers that are fed the same, such as query, key and value of an attention: buffered and written together.

Their suffixes are copied once, and written once for all that keep the same positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence

from torch import Tensor

from metaql.storage.blocks import Factored, Full
from metaql.storage.layer_writer import LayerWriter
from metaql.storage.packing import Packer
from metaql.storage.schema import Layer
from metaql.storage.staging import BufferPool, Staged, Staging

_SLICE_BYTES = 32 << 20
_LARGEST_BATCH_BYTES = 64 << 20


class Bundle:
    """Some layers on their way to their ``writers``; ``flushed`` are the bytes that went there."""

    def __init__(
        self, layers: Sequence[Layer], writers: Mapping[str, LayerWriter], pool: BufferPool, flushed: int = 0
    ) -> None:
        self.layers = layers
        self.staging = Staging(layers, pool)
        self.flushed = flushed
        self._writers = writers
        self._pool = pool
        self._packer = Packer(layers)

    def part(self, layers: Sequence[Layer]) -> Bundle:
        """A bundle in which some of the layers go on, once nothing is waiting here."""
        return Bundle(layers, self._writers, self._pool, self.flushed)

    def append(self, blocks: Mapping[str, Factored | Full], scale: Tensor | None) -> int:
        """Copies the layers' blocks, as ``Staging`` does; returns the bytes."""
        return self.staging.append([blocks[layer.name] for layer in self.layers], scale)

    def write(self, staged: Staged) -> None:
        """Appends the samples to the layers' files, in record batches of the same rows, some tens of megabytes each."""
        writers = [self._writers[layer.name] for layer in self.layers]
        packed = self._packer.pack(staged, lambda place, positions: writers[place].may_be_fixed(positions))
        largest = max(one.batch.nbytes for one in packed)
        pieces = -(-largest // _SLICE_BYTES) if largest > _LARGEST_BATCH_BYTES else 1
        for writer, one in zip(writers, packed, strict=True):
            writer.write(one, -(-staged.samples // pieces))


def bundled(layers: Iterable[Layer], blocks: Mapping[str, Factored | Full]) -> list[list[Layer]]:
    """The layers whose blocks have their suffixes in common."""
    found: dict[Hashable, list[Layer]] = {}
    for layer in layers:
        found.setdefault(_mark(layer, blocks[layer.name]), []).append(layer)
    return list(found.values())


def _mark(layer: Layer, block: Factored | Full) -> Hashable:
    """Equal for blocks with the same suffix at the same place in memory, and as many positions for each sample."""
    if isinstance(block, Full) or layer.kind == "embedding":
        return layer.name
    positions = len(block.prefix), None if block.offsets is None else block.offsets.data_ptr()
    return _place(block.suffix), positions if len(block.prefix) else 0, layer.unfold is None


def _place(values: Tensor) -> Hashable:
    return values.data_ptr(), values.device, values.dtype, values.shape, values.stride()
