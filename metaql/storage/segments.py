"""The record batches of one layer, or of the inputs, as tensors, opened when they are first touched."""

from __future__ import annotations

import resource
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from metaql.storage.arrow_arrays import as_numpy
from metaql.storage.forms import DIFFERING
from metaql.storage.manifest import DataFile
from metaql.storage.mapped_file import MappedFile, StoreFolder

# Every open file costs a descriptor. Several stores may be open, and the program has files of its own.
_SHARE_OF_DESCRIPTORS = 4
_MOST_FILES = 4096

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class Columns:
    """A record batch as views of its file.

    Without ``offsets`` each tensor is [rows, values of a row]. With ``offsets`` (int64 [rows + 1]) each is
    [positions, values of a position], and row k has the positions from offsets[k] to offsets[k + 1].
    """

    file: MappedFile
    tensors: tuple[Tensor, ...]
    offsets: Array | None


@dataclass(frozen=True)
class Source:
    """A file of consecutive rows, its form, and the store-wide number of its first row.

    ``suffixes`` is where its first column is, in record batches of the same rows, where the file lacks it.
    """

    file: DataFile
    form: str
    first_row: int
    suffixes: BatchIndex | None = None


class OpenFiles:
    """The store's files that are open now; the one opened first is let go when there are too many."""

    def __init__(self, folder: StoreFolder) -> None:
        self._folder = folder
        self.limit = _open_files()
        self._files: OrderedDict[str, MappedFile] = OrderedDict()
        self._columns: dict[tuple[str, int], Columns] = {}
        self._lock = Lock()

    def get(self, file: DataFile) -> MappedFile:
        """The file, opened if need be."""
        with self._lock:
            mapped = self._files.get(file.path)
            if mapped is None:
                mapped = self._files[file.path] = MappedFile(self._folder, file)
                while len(self._files) > self.limit:
                    self._let_go()
            return mapped

    def columns(self, source: Source, batch: int) -> Columns:
        """A record batch of a source; CorruptStoreError if its file is not as it was written."""
        key = (source.file.path, batch)
        columns = self._columns.get(key)
        if columns is None:
            # Two threads may both come here; they load the same views, and neither waits for the other.
            columns = _load(self.get(source.file), source, batch)
            with self._lock:
                if source.file.path in self._files:
                    self._columns[key] = columns
        else:
            columns.file.require_whole()
        return columns

    def clear(self) -> None:
        """Lets go of every file; views that were handed out stay valid."""
        with self._lock:
            self._files.clear()
            self._columns.clear()

    def _let_go(self) -> None:
        path, _ = self._files.popitem(last=False)
        for key in [key for key in self._columns if key[0] == path]:
            del self._columns[key]


class BatchIndex:
    """Finds rows in the record batches of several sources, which are in the order of their rows."""

    def __init__(self, open_files: OpenFiles, sources: Iterable[Source]) -> None:
        self._open_files = open_files
        self._batches: list[tuple[Source, int]] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        for source in sources:
            row = source.first_row
            for number, part in enumerate(source.file.batches):
                self._batches.append((source, number))
                self.starts.append(row)
                row += part.rows
                self.ends.append(row)
        self.start_array = np.array(self.starts, dtype=np.int64)
        self.end_array = np.array(self.ends, dtype=np.int64)

    def columns(self, batch: int) -> Columns:
        """The batch with this place among all batches."""
        source, number = self._batches[batch]
        own = self._open_files.columns(source, number)
        if source.suffixes is None:
            return own
        first, *_ = source.suffixes.columns(source.suffixes.at(self.starts[batch])).tensors
        return Columns(own.file, (first, *own.tensors), own.offsets)

    def at(self, row: int) -> int:
        """The place of the last batch that begins at this row or before it; -1 if there is none."""
        return bisect_right(self.starts, row) - 1


def _open_files() -> int:
    """How many files a store may hold open in this process."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    unlimited = allowed == resource.RLIM_INFINITY
    return _MOST_FILES if unlimited else min(allowed // _SHARE_OF_DESCRIPTORS, _MOST_FILES)


def _load(file: MappedFile, source: Source, number: int) -> Columns:
    batch = file.batch(number)
    if source.form == DIFFERING:
        offsets = as_numpy(batch.column(0).offsets)
        return Columns(file, tuple(_matrix(column.values) for column in batch.columns), offsets)
    return Columns(file, tuple(_matrix(column) for column in batch.columns), None)


def _matrix(column: Any) -> Tensor:
    """A column as a tensor, [rows, width] for a FixedSizeList, without a copy."""
    width = column.type.list_size if pa.types.is_fixed_size_list(column.type) else None
    values = column if width is None else column.values
    if pa.types.is_uint16(values.type):
        # torch knows sixteen bits by their signed type in every version.
        values = values.view(pa.int16())
    flat = torch.utils.dlpack.from_dlpack(values)
    return flat if width is None else flat.view(len(column), width)
