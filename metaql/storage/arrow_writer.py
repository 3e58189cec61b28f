"""Writes an Arrow IPC file and notes the CRC32 of its header, of each record batch and of its footer."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from metaql.storage.manifest import DataFile, Range
from metaql.storage.sequential_file import SequentialFile

_MAGIC_BYTES = 8


class ArrowWriter:
    """One new file of the store; ``path`` must not exist yet. OSErrors come out as they are."""

    def __init__(self, path: Path, schema: Any) -> None:
        self.path = path
        # Arrow writes the header along with the first batch, so the sink must know where the one ends.
        self._sink = _ChecksumFile(path, header_bytes=_MAGIC_BYTES + schema.serialize().size)
        self._writer = pa.ipc.new_file(self._sink, schema)
        self._ranges: list[Range] = []

    @property
    def bytes(self) -> int:
        """Bytes written so far."""
        return self._sink.offset

    def write(self, batch: Any) -> None:
        """Appends a record batch."""
        self._writer.write_batch(batch)
        self._ranges.append(self._sink.cut(batch.num_rows))

    def close(self) -> DataFile:
        """Completes the file and brings it to the disk. Its path is the bare name: the folder may yet move."""
        self._writer.close()
        footer = self._sink.cut(0)
        self._sink.finish()
        header = self._sink.header
        assert header is not None
        return DataFile(self.path.name, self._sink.offset, (header, *self._ranges, footer))

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._sink.release()


class _ChecksumFile(io.RawIOBase):
    """A new file that sums what passes through it; ``cut`` ends a range."""

    def __init__(self, path: Path, header_bytes: int) -> None:
        self._file = SequentialFile(path)
        self._header_bytes = header_bytes
        self._begin = 0
        self._crc = 0
        self.header: Range | None = None

    @property
    def offset(self) -> int:
        return self._file.offset

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.offset

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._crc = zlib.crc32(view, self._crc)
        self._file.write(view)
        if self.offset == self._header_bytes:
            self.header = self.cut(0)
        return len(view)

    def cut(self, rows: int) -> Range:
        part = Range(self._begin, self.offset - self._begin, self._crc, rows)
        self._begin, self._crc = self.offset, 0
        return part

    def finish(self) -> None:
        self._file.finish()

    def release(self) -> None:
        self._file.release()


def write_table(path: Path, table: Any, rows_per_batch: int = 1 << 16) -> DataFile:
    """Writes a whole table as a file of its own and brings it to the disk."""
    # A file may hold one dictionary for a column, so chunks with their own are brought to one.
    table = table.unify_dictionaries()
    writer = ArrowWriter(path, table.schema)
    try:
        for batch in table.to_batches(max_chunksize=rows_per_batch):
            writer.write(batch)
        return writer.close()
    except BaseException:
        writer.abandon()
        raise
