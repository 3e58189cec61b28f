"""Writes one layer's gradients of one collection: a segment, and the next one when the form changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from metaql.storage.arrow_writer import ArrowWriter
from metaql.storage.forms import DIFFERING, FIXED
from metaql.storage.manifest import Segment, Statistics
from metaql.storage.packing import Packed, pack
from metaql.storage.schema import Layer
from metaql.storage.staging import Staged

_SLICE_BYTES = 32 << 20
_LARGEST_BATCH_BYTES = 64 << 20


@dataclass
class _Open:
    """The segment being written."""

    form: str
    schema: object
    first_row: int
    writer: ArrowWriter
    statistics: list[Statistics] = field(default_factory=list)


class LayerWriter:
    """Rows and paths of its segments count from the collection's beginning and folder."""

    def __init__(self, folder: Path, number: int, layer: Layer) -> None:
        self._folder = folder
        self._number = number
        self._layer = layer
        self._rows = 0
        self._open: _Open | None = None
        self._segments: list[Segment] = []

    def write(self, staged: Staged) -> None:
        """Appends the samples, in batches of some tens of megabytes."""
        packed = self._pack(staged)
        segment = self._segment(packed)
        segment.statistics.append(packed.statistics)
        rows = packed.batch.num_rows
        pieces = 1
        if packed.batch.nbytes > _LARGEST_BATCH_BYTES:
            pieces = -(-packed.batch.nbytes // _SLICE_BYTES)
        step = -(-rows // pieces)
        for begin in range(0, rows, step):
            segment.writer.write(packed.batch.slice(begin, step))
        self._rows += rows

    def close(self) -> list[Segment]:
        """Completes the files and brings them to the disk."""
        self._close_segment()
        return self._segments

    def abandon(self) -> None:
        """Closes the files as they are."""
        if self._open is not None:
            self._open.writer.abandon()

    def _pack(self, staged: Staged) -> Packed:
        """In the open segment's form where that can be; once samples differed, the form does not go back."""
        packed = pack(self._layer, staged, may_be_fixed=self._open is None or self._open.form != DIFFERING)
        if packed.form == FIXED and self._open is not None and self._open.schema != packed.batch.schema:
            return pack(self._layer, staged, may_be_fixed=False)
        return packed

    def _segment(self, packed: Packed) -> _Open:
        """The open segment if the batch fits into it, else the next."""
        if self._open is None or self._open.schema != packed.batch.schema:
            self._close_segment()
            path = self._folder / f"{self._number}-{len(self._segments)}.arrow"
            writer = ArrowWriter(path, packed.batch.schema)
            self._open = _Open(packed.form, packed.batch.schema, self._rows, writer)
        return self._open

    def _close_segment(self) -> None:
        if self._open is None:
            return
        segment, self._open = self._open, None
        try:
            file = segment.writer.close()
        finally:
            segment.writer.abandon()
        statistics = Statistics(
            positions=sum(one.positions for one in segment.statistics),
            dropped=sum(one.dropped for one in segment.statistics),
            fewest=min(one.fewest for one in segment.statistics),
            most=max(one.most for one in segment.statistics),
        )
        rows = self._rows - segment.first_row
        self._segments.append(Segment(self._layer.name, segment.first_row, rows, segment.form, file, statistics))
