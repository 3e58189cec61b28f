"""One version of a store, open for reading."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from metaql.errors import ReferenceError, StoreError, UnknownNameError
from metaql.storage.blocks import Block, Factored, Full, whole
from metaql.storage.commit import read_manifest
from metaql.storage.forms import FULL as FULL_FORM
from metaql.storage.forms import prefix_width, suffix_bytes, suffix_row_width, suffix_width
from metaql.storage.gather import MissingRowError, Rows, Widths, read_rows
from metaql.storage.manifest import Checkpoint, Collection, Curvature, DataFile, Manifest
from metaql.storage.mapped_file import StoreFolder
from metaql.storage.schema import FULL, Layer, stored_parts
from metaql.storage.segments import BatchIndex, OpenFiles, Source
from metaql.storage.vectors import read_vectors

Array = np.ndarray[Any, np.dtype[Any]]
_CHUNK_BYTES = 1 << 20


class Store:
    """An immutable snapshot: what a writer commits later is not in it. Reads may come from several threads.

    >>> store = Store.open("runs/digits")                                   # doctest: +SKIP
    >>> store.read(store.layer("fc1"), np.arange(100))                      # doctest: +SKIP
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._folder = StoreFolder(path, manifest)
        self._open_files = OpenFiles(self._folder)
        self._layers = {layer.name: layer for layer in manifest.layers}
        self._indices: dict[str, BatchIndex] = {}
        self._widths = {part.name: _widths(part) for layer in manifest.layers for part in stored_parts(layer)}
        self._starts = np.array([one.first_row for one in manifest.collections], dtype=np.int64)
        self._ends = self._starts + np.array([one.rows for one in manifest.collections], dtype=np.int64)

    @classmethod
    def open(cls, path: str | Path, version: int | None = None) -> Store:
        """The current version, or an older one that is not vacuumed. Touches no gradients."""
        folder = Path(path)
        return cls(folder, read_manifest(folder, version))

    @property
    def id(self) -> int:
        """The store's own number, the same for all its versions."""
        return self.manifest.id

    @property
    def version(self) -> int:
        """The version this is a snapshot of."""
        return self.manifest.version

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What is recorded, in the model's order."""
        return self.manifest.layers

    def layer(self, name: str) -> Layer:
        """The layer of that name; UnknownNameError, with those there are, if there is none."""
        if name in self._layers:
            return self._layers[name]
        close = difflib.get_close_matches(name, self._layers, 1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise UnknownNameError(f'There is no layer "{name}".{hint} The layers are: {", ".join(self._layers)}.')

    def read(self, layer: Layer, rows: Array) -> Block:
        """A layer's gradients for these rows (int64, any order, duplicates allowed), in that order.

        Rows that follow one another in a record batch are read-only views of the file: don't write to them.
        bfloat16 comes as float32. ReferenceError when the store does not have a row.
        """
        return whole([self._read(part, rows) for part in stored_parts(layer)])

    def _read(self, layer: Layer, rows: Array) -> Block:
        widths = self._widths[layer.name]
        if not len(rows):
            return _block(layer, _no_rows(layer, widths), 0)
        try:
            found = read_rows(self._index(layer.name), rows, widths)
        except MissingRowError as missing:
            raise self._no_such_row(missing.row) from None
        return _block(layer, found, len(rows))

    def row_bytes(self, layer: Layer) -> int:
        """Bytes to read of an average row of a layer, also those that it shares; 0 where nothing is stored."""
        found = 0
        for part in stored_parts(layer):
            segments = [one for each in self.manifest.collections for one in each.segments if one.layer == part.name]
            shared = (suffix_bytes(part, one.rows, one.statistics.positions) for one in segments if one.suffix_of)
            rows = sum(one.rows for one in segments)
            found += round(sum(one.file.bytes for one in segments) + sum(shared)) // max(rows, 1)
        return found

    def together(self, layer: Layer, row: int) -> int:
        """How many rows from this one on lie in its record batch, so that reading them copies nothing."""
        return min(max(self.batch(part, row)[1] - row, 0) for part in stored_parts(layer))

    def stretch(self, row: int) -> tuple[int, int]:
        """The collection's rows around this one: the first, and one past the last; (row, row) when there is none."""
        place = int(self._starts.searchsorted(row, "right")) - 1
        if place < 0 or row >= self._ends[place]:
            return row, row
        return int(self._starts[place]), int(self._ends[place])

    def batch(self, layer: Layer, row: int) -> tuple[int, int]:
        """The rows of the record batch that holds this one: first, and one past the last; none if there is no such.

        ``layer`` is one of ``stored_parts``.
        """
        index = self._index(layer.name)
        batch = index.at(row)
        if batch < 0 or row >= index.ends[batch]:
            return row, row
        return index.starts[batch], index.ends[batch]

    def has_rows(self, rows: Array) -> bool:
        """Whether the store has all of these rows."""
        if not len(rows):
            return True
        if not len(self._starts):
            return False
        collections = np.searchsorted(self._starts, rows, side="right") - 1
        return bool(((collections >= 0) & (rows < self._ends[collections])).all())

    def inputs(self, rows: Array) -> Tensor:
        """The inputs of the samples of these rows, [n, ...]; StoreError where they were not recorded."""
        self._require_rows(rows)
        places = np.unique(np.searchsorted(self._starts, rows, side="right") - 1)
        kept = [self.manifest.collections[place] for place in places.tolist()]
        files = [(one.inputs.file, one.first_row) for one in kept if one.inputs and one.inputs.file]
        without = [one.split for one in kept if not (one.inputs and one.inputs.file)]
        if without or not kept:
            split = f"split '{without[0]}'" if without else "no rows"
            raise StoreError(f"The inputs of {split} were not kept: record with Recorder(..., inputs=True).")
        kinds = {(one.inputs.shape, one.inputs.dtype) for one in kept if one.inputs}
        if len(kinds) > 1:
            raise StoreError(f"These rows' inputs differ in shape or type and can't be one tensor: {sorted(kinds)}.")
        shape, dtype = kinds.pop()
        sources = [Source(file, FULL_FORM, first_row) for file, first_row in files]
        (values,) = read_rows(BatchIndex(self._open_files, sources), rows, (0,)).tensors
        return _as_dtype(values, getattr(torch, dtype)).reshape(len(rows), *shape)

    def logits(self, rows: Array) -> Any:
        """The logits of these rows as an Arrow array of lists; NULL where they were not kept."""
        return self._vectors(rows, lambda one: one.logits, "values")

    def embeddings(self, layer: str, rows: Array, column: str = "values") -> Any:
        """What this module put out for these rows, flat, as an Arrow array of lists; NULL where it was not kept.

        With the column ``shape`` the shapes of these.
        """
        return self._vectors(
            rows, lambda one: next((each.file for each in one.embeddings if each.layer == layer), None), column
        )

    def weights(self, checkpoint: int) -> dict[str, Tensor]:
        """A checkpoint's state dict, on the CPU."""
        return self._tensors(self._checkpoint(checkpoint))

    def curvature(self, saved: Curvature) -> dict[str, Tensor]:
        """The tensors of a curvature of the manifest, on the CPU; ``curvatures.unpack`` reads them."""
        return self._tensors(saved)

    def _tensors(self, saved: Checkpoint | Curvature) -> dict[str, Tensor]:
        path = self.path / saved.path
        try:
            with open(path, "rb") as file:
                size, crc = _size_and_crc(file)
                if size != saved.bytes:
                    raise self._folder.damaged(saved.path, f"has {size:,} bytes instead of {saved.bytes:,}")
                if crc != saved.crc:
                    raise self._folder.damaged(saved.path, "is changed (its checksum is wrong)")
                file.seek(0)
                return cast("dict[str, Tensor]", torch.load(file, map_location="cpu", weights_only=True))
        except FileNotFoundError:
            raise self._folder.missing(saved.path) from None

    def table(self, file: DataFile) -> Any:
        """One of the manifest's tables (rows, metadata, steps) as Arrow, mapped from its file."""
        return self._open_files.get(file).table()

    def close(self) -> None:
        """Lets go of the files; tensors and tables that were handed out stay valid."""
        self._open_files.clear()

    def _vectors(self, rows: Array, file_of: Callable[[Collection], DataFile | None], column: str) -> Any:
        self._require_rows(rows)
        collections = self.manifest.collections
        return read_vectors(
            self._open_files.get, lambda number: file_of(collections[number]), self._starts, rows, column
        )

    def _index(self, name: str) -> BatchIndex:
        index = self._indices.get(name)
        if index is None:
            sources = [
                Source(one.file, one.form, one.first_row, self._index(one.suffix_of) if one.suffix_of else None)
                for collection in self.manifest.collections
                for one in collection.segments
                if one.layer == name
            ]
            index = self._indices[name] = BatchIndex(self._open_files, sources)
        return index

    def _checkpoint(self, number: int) -> Checkpoint:
        for checkpoint in self.manifest.checkpoints:
            if checkpoint.number == number:
                return checkpoint
        there = ", ".join(str(one.number) for one in self.manifest.checkpoints) or "none"
        raise UnknownNameError(f"There is no checkpoint {number} in {self.path} (any more). There are: {there}.")

    def _require_rows(self, rows: Array) -> None:
        for row in rows[:0] if self.has_rows(rows) else rows:
            if not self.has_rows(np.array([row])):
                raise self._no_such_row(int(row))

    def _no_such_row(self, row: int) -> ReferenceError:
        return ReferenceError(
            f"Row {row} is not, or no longer, in version {self.version} of {self.path}: its checkpoint was dropped, "
            "or the reference was made by a newer version. Connect again, and take references from `gradients`."
        )


def _widths(layer: Layer) -> Widths:
    if layer.layout == FULL:
        return (layer.width,)
    if layer.kind == "embedding":
        return (0, prefix_width(layer))
    return (suffix_row_width(layer, positions=1), prefix_width(layer))


def _no_rows(layer: Layer, widths: Widths) -> Rows:
    dtype = torch.int16 if layer.dtype == "bfloat16" else getattr(torch, layer.dtype)
    return Rows(tuple(torch.empty((0, width) if width else 0, dtype=dtype) for width in widths), None)


def _block(layer: Layer, rows: Rows, samples: int) -> Block:
    """Rows in the shapes of blocks.py, in a type to compute with."""
    if layer.layout == FULL:
        return Full(_values(layer, rows.tensors[0]))
    suffix, prefix = rows.tensors
    prefix = _values(layer, prefix).view(-1, prefix_width(layer))
    if layer.kind == "embedding":
        suffix = suffix.reshape(-1).to(torch.int64)
    elif layer.unfold is not None:
        suffix = _values(layer, suffix)
    else:
        suffix = _values(layer, suffix).view(-1, suffix_width(layer))
    return Factored(suffix, prefix, samples, rows.offsets)


def _values(layer: Layer, stored: Tensor) -> Tensor:
    return stored.view(torch.bfloat16).float() if layer.dtype == "bfloat16" else stored


def _as_dtype(stored: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored inputs in their own type: bits of half types by a view, bytes of booleans likewise."""
    return stored if stored.dtype == dtype else stored.view(dtype)


def _size_and_crc(file: Any) -> tuple[int, int]:
    size = crc = 0
    while chunk := file.read(_CHUNK_BYTES):
        size += len(chunk)
        crc = zlib.crc32(chunk, crc)
    return size, crc
