"""An Arrow file of the store, mapped into memory and checked before it is believed.

A file that is cut off under a mapping kills the process that touches it (SIGBUS), so sizes are compared before
mapping and again before each use; what remains is a cut within that very use. Checksums are compared once in a
process: those of header and footer when the file is opened, a batch's when it is first touched.
"""

from __future__ import annotations

import mmap
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa

from metaql.errors import CorruptStoreError, ReferenceError
from metaql.storage.commit import manifest_path
from metaql.storage.manifest import DataFile, Manifest, Range


class StoreFolder:
    """Where a version's files lie, what to advise about each, and which of their batches were found whole."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.verified: set[tuple[str, int]] = set()
        self._checkpoint_of = {
            file.path: collection.checkpoint for collection in manifest.collections for file in collection.files
        }
        self._checkpoint_of.update({one.path: one.number for one in manifest.checkpoints})

    def cure(self, path: str) -> str:
        """What to do about a damaged file."""
        number = self._checkpoint_of.get(path)
        if number is None:
            return "restore it from a backup, or record again with overwrite=True"
        return (
            f"restore it from a backup, or drop checkpoint {number} with `metaql drop-checkpoint {self.path} "
            f"{number}`, which removes what is recorded there"
        )

    def missing(self, path: str) -> Exception:
        """The error for a file that is not there: lost, or vacuumed with the version we read."""
        if not manifest_path(self.path, self.manifest.version).exists():
            return ReferenceError(
                f"Version {self.manifest.version} of {self.path} was vacuumed, and {path} with it: connect again "
                "to read the current version."
            )
        return CorruptStoreError(f"{self.path / path} is missing: {self.cure(path)}.")

    def damaged(self, path: str, what: str) -> Exception:
        """The error for a file that is not as it was written."""
        if not manifest_path(self.path, self.manifest.version).exists():
            return self.missing(path)
        return CorruptStoreError(f"{self.path / path} {what}: {self.cure(path)}.")


class MappedFile:
    """Opens and maps the file; CorruptStoreError when it is missing, has another size or a wrong checksum."""

    def __init__(self, folder: StoreFolder, file: DataFile) -> None:
        self._folder = folder
        self._file = file
        self._map = self._open()
        self._bytes = memoryview(self._map)
        for part in (file.ranges[0], file.ranges[-1]):
            self._require_sum(part)
        try:
            self._reader = pa.ipc.open_file(pa.py_buffer(self._map))
        except pa.ArrowInvalid as error:
            raise folder.damaged(file.path, f"is not the Arrow file it was ({error})") from error

    def require_whole(self) -> None:
        """CorruptStoreError when the file has been cut off since it was mapped."""
        if self._map.size() != self._file.bytes:
            raise self._wrong_size(self._map.size())

    def batch(self, number: int) -> Any:
        """A record batch, as views of the file."""
        self.require_whole()
        mark = (self._file.path, number)
        if mark not in self._folder.verified:
            self._require_sum(self._file.batches[number])
            self._folder.verified.add(mark)
        return self._reader.get_batch(number)

    def table(self) -> Any:
        """The whole file, as views of it."""
        self.require_whole()
        for number, part in enumerate(self._file.batches):
            mark = (self._file.path, number)
            if mark not in self._folder.verified:
                self._require_sum(part)
                self._folder.verified.add(mark)
        return self._reader.read_all()

    def _open(self) -> mmap.mmap:
        try:
            with open(self._folder.path / self._file.path, "rb") as file:
                size = file.seek(0, 2)
                if size != self._file.bytes:
                    raise self._wrong_size(size)
                return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise self._folder.missing(self._file.path) from None

    def _require_sum(self, part: Range) -> None:
        if zlib.crc32(self._bytes[part.offset : part.offset + part.length]) != part.crc:
            where = f"bytes {part.offset} to {part.offset + part.length}"
            raise self._folder.damaged(self._file.path, f"is changed (the checksum of {where} is wrong)")

    def _wrong_size(self, size: int) -> Exception:
        return self._folder.damaged(self._file.path, f"has {size:,} bytes instead of {self._file.bytes:,}")
