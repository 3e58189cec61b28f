"""Writes one layer's gradients of one collection: a segment, and the next one when the form changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from metaql.storage.arrow_writer import ArrowWriter
from metaql.storage.forms import FIXED
from metaql.storage.manifest import Segment, Statistics
from metaql.storage.packing import Packed
from metaql.storage.schema import Layer


@dataclass
class _Open:
    """The segment being written."""

    form: str
    schema: object
    suffix_of: str | None
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

    def may_be_fixed(self, positions: int) -> bool:
        """Whether samples of so many positions may go on in the form ``fixed``; once they differed, none may."""
        if self._open is None:
            return True
        return self._open.form == FIXED and self._open.statistics[-1].most == positions

    def write(self, packed: Packed, rows_at_once: int) -> None:
        """Appends the samples, in record batches of so many."""
        segment = self._segment(packed)
        segment.statistics.append(packed.statistics)
        rows = packed.batch.num_rows
        for begin in range(0, rows, rows_at_once):
            segment.writer.write(packed.batch.slice(begin, rows_at_once))
        self._rows += rows

    def close(self) -> list[Segment]:
        """Completes the files and brings them to the disk."""
        self._close_segment()
        return self._segments

    def abandon(self) -> None:
        """Closes the files as they are."""
        if self._open is not None:
            self._open.writer.abandon()

    def _segment(self, packed: Packed) -> _Open:
        """The open segment if the batch fits into it, else the next."""
        schema = packed.batch.schema
        if self._open is None or (self._open.schema, self._open.suffix_of) != (schema, packed.suffix_of):
            self._close_segment()
            path = self._folder / f"{self._number}-{len(self._segments)}.arrow"
            self._open = _Open(packed.form, schema, packed.suffix_of, self._rows, ArrowWriter(path, schema))
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
        self._segments.append(
            Segment(self._layer.name, segment.first_row, rows, segment.form, file, statistics, segment.suffix_of)
        )
