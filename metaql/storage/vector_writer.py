"""Writes what the model put out for the samples of one collection: logits, and outputs of modules (embeddings).

Each has a file of its own, in which row k is the collection's row k: ``values``, flat, and their ``shape``, for outputs
may differ in size from batch to batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from metaql.errors import InternalError
from metaql.storage.arrow_arrays import primitive
from metaql.storage.arrow_writer import ArrowWriter
from metaql.storage.manifest import DataFile, Embeddings

VECTOR_SCHEMA = pa.schema(
    [
        pa.field("shape", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("values", pa.large_list(pa.field("item", pa.float32(), nullable=False)), nullable=False),
    ]
)


class VectorFile:
    """One file: vectors wait in it until ``take``, whose job writes them."""

    def __init__(self, path: Path) -> None:
        self.waiting = 0
        self._pieces: list[Tensor] = []
        self._writer = ArrowWriter(path, VECTOR_SCHEMA)

    def append(self, vectors: Tensor) -> None:
        """Takes [n, *shape], float32 on the CPU, which it keeps."""
        self._pieces.append(vectors)
        self.waiting += vectors.nbytes

    def take(self) -> Callable[[], None]:
        """What writes the vectors that wait; they no longer do."""
        pieces, self._pieces, self.waiting = self._pieces, [], 0
        return partial(self._write, pieces)

    def close(self) -> DataFile:
        """Completes the file and brings it to the disk."""
        return self._writer.close()

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._writer.abandon()

    def _write(self, pieces: Sequence[Tensor]) -> None:
        if not pieces:
            return
        counts = [len(piece) for piece in pieces]
        shapes = np.concatenate([np.tile(np.array(piece.shape[1:], dtype=np.int32), len(piece)) for piece in pieces])
        values = np.concatenate([piece.reshape(-1).numpy() for piece in pieces])
        ranks = _offsets(np.repeat([piece.dim() - 1 for piece in pieces], counts), np.int32)
        lengths = _offsets(np.repeat([piece[0].numel() for piece in pieces], counts), np.int64)
        shape, flat = VECTOR_SCHEMA.types
        columns = [
            pa.ListArray.from_arrays(primitive(ranks, pa.int32()), primitive(shapes, pa.int32()), type=shape),
            pa.LargeListArray.from_arrays(primitive(lengths, pa.int64()), primitive(values, pa.float32()), type=flat),
        ]
        self._writer.write(pa.record_batch(columns, schema=VECTOR_SCHEMA))


class VectorFiles:
    """The files of one collection, of those logits and modules that its first samples come with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._logits: VectorFile | None = None
        self._embeddings: dict[str, VectorFile] = {}

    @property
    def waiting(self) -> int:
        """Bytes that wait to be written."""
        return sum(file.waiting for file in self._files)

    def require(self, logits: Tensor | None, embeddings: Mapping[str, Tensor], samples: int, is_first: bool) -> None:
        """Opens the files for the first samples; InternalError for others that come with more or less than they."""
        if is_first and not self._files:
            self._open(logits is not None, list(embeddings))
        given = (logits is not None, set(embeddings))
        if given != (self._logits is not None, set(self._embeddings)) or any(
            len(each) != samples for each in (logits, *embeddings.values()) if each is not None
        ):
            raise InternalError(f"{samples} samples come with other logits or embeddings than those before.")

    def append(self, logits: Tensor | None, embeddings: Mapping[str, Tensor]) -> int:
        """Takes those of one batch of samples; returns their bytes."""
        before = self.waiting
        if self._logits is not None and logits is not None:
            self._logits.append(logits)
        for name, vectors in embeddings.items():
            self._embeddings[name].append(vectors)
        return self.waiting - before

    def take(self) -> list[tuple[Callable[[], None], int]]:
        """Jobs that write what waits, each with its bytes."""
        sizes = [file.waiting for file in self._files]
        return [(file.take(), size) for file, size in zip(self._files, sizes, strict=True)]

    def close(self) -> tuple[DataFile | None, tuple[Embeddings, ...]]:
        """Completes the files and brings them to the disk."""
        logits = None if self._logits is None else self._logits.close()
        return logits, tuple(Embeddings(name, file.close()) for name, file in self._embeddings.items())

    def abandon(self) -> None:
        """Closes the files as they are."""
        for file in self._files:
            file.abandon()

    @property
    def _files(self) -> list[VectorFile]:
        return [*([] if self._logits is None else [self._logits]), *self._embeddings.values()]

    def _open(self, logits: bool, names: Sequence[str]) -> None:
        self._logits = VectorFile(self._folder / "logits.arrow") if logits else None
        for number, name in enumerate(names):
            self._embeddings[name] = VectorFile(self._folder / f"embeddings-{number}.arrow")


def _offsets(lengths: Any, dtype: Any) -> Any:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)
