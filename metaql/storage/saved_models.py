"""Models that are kept by name: in a store's folder ``models``, or in a folder of their own.

A model is a folder with numbered versions, of which ``HEAD`` names the current one. Each is a description (JSON), its
tensors (safetensors) and its tables (Parquet); nothing in it runs when it is read. The version before stays for those
who are reading it. ``docs/storage-format.md`` describes them.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from metaql.errors import CorruptStoreError, QueryError, StoreError, UnknownNameError, WriteError
from metaql.storage.durable import replace_file

MODELS = "models"
HEAD = "HEAD"
LOCK = "writer.lock"
FORMAT_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
_NUMBERED = re.compile(r"\d{8}\.")
_ATTEMPTS = 5


@dataclass(frozen=True)
class SavedModel:
    """A version of a model as it lies on the disk; ``stamp`` changes when another takes its place."""

    folder: Path
    version: int
    stamp: tuple[int, int, int]
    kind: str
    description: Mapping[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; CorruptStoreError where they are not what was saved."""
        import safetensors.torch

        return safetensors.torch.load(self._read(f"{self.version:08d}.safetensors"))

    def table(self, name: str) -> Path:
        """Where a table of it lies, a Parquet file; CorruptStoreError where it is not what was saved."""
        file = f"{self.version:08d}.{name}.parquet"
        self._read(file)
        return self.folder / file

    def require_whole(self) -> None:
        """CorruptStoreError unless all files are what was saved."""
        for file, *_ in self.description["files"]:
            self._read(file)

    def _read(self, file: str) -> bytes:
        ((size, crc),) = (told for name, *told in self.description["files"] if name == file)
        data = _bytes(self.folder / file)
        if len(data) != size or zlib.crc32(data) != crc:
            raise _damaged(self.folder / file, "is changed")
        return data


def place_of(stores: tuple[Path, ...], name: str) -> Path:
    """The folder of a model: of a plain name in one of the stores' own, else the folder that was given.

    QueryError for what can be neither, and where several stores have a model of that name.
    """
    if os.sep in name:
        if ".." in Path(name).parts or not Path(name).name:
            raise QueryError(f"'{name}' can't be a model's folder: write its path without '..', or a plain name")
        return Path(name).expanduser()
    if not _NAME.fullmatch(name):
        raise QueryError(
            f"'{name}' can't be the name of a model: use letters, digits, _, - and . (as in 'sensors_v1'), or give the"
            f" path of a folder (as in 'models{os.sep}sensors_v1')"
        )
    places = [store / MODELS / name for store in stores]
    there = [place for place in places if (place / HEAD).exists()]
    if len(there) > 1:
        told = ", ".join(f"'{place}'" for place in there)
        raise QueryError(f"several stores have a model '{name}'. Say which is meant by its folder: {told}")
    return (there or places)[0]


def names(store: Path) -> list[str]:
    """The models that a store keeps."""
    folder = store / MODELS
    return sorted(path.parent.name for path in folder.glob(f"*/{HEAD}")) if folder.is_dir() else []


def stamp(folder: Path) -> tuple[int, int, int] | None:
    """What changes when a model is replaced; None where there is none. Takes microseconds."""
    try:
        found = os.stat(folder / HEAD)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def is_there(folder: Path, digest: str) -> bool:
    """Whether the current version is the one of this digest, and whole."""
    try:
        found = read(folder)
        found.require_whole()
        return bool(found.description["digest"] == digest)
    except (StoreError, UnknownNameError):
        return False


def require_place(folder: Path, kind: str) -> None:
    """Raises what can be known before there is anything to save, and changes nothing.

    QueryError where a model of another kind or something else lies there, WriteError where nothing may be written.
    """
    if folder.exists() and not folder.is_dir():
        raise QueryError(f"can't save a model as {folder}: that is a file. Choose another name")
    if (folder / HEAD).exists():
        with suppress(CorruptStoreError):
            found = read(folder).kind
            if found != kind:
                raise QueryError(f"{folder} holds a model of another kind ({found}): choose another name for this one")
    elif folder.is_dir() and any(not _is_ours(path) for path in folder.iterdir()):
        raise QueryError(f"{folder} is a folder with other files in it: choose one that is empty, or a new name")
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise WriteError(
            f"can't save a model in {folder}: {place} is read-only. Ask for permission to write there, or give a folder"
            " of your own (save_as := '/path/of/a/folder')"
        )


def save(
    folder: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    tables: Mapping[str, pa.Table],
) -> None:
    """Makes this the current version of the model, or changes nothing. WriteError when the system refuses."""
    require_place(folder, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _commit(folder, kind, tensors, description, tables)
    except OSError as error:
        with suppress(OSError):
            folder.rmdir()
        raise WriteError(
            f"can't save the model as {folder}: {error.strerror or error}. What was there before is as it was. Make"
            " room, or mend the permissions, and run the query again"
        ) from error


def read(folder: Path) -> SavedModel:
    """The current version. UnknownNameError where there is none, CorruptStoreError where it is damaged."""
    for attempt in range(_ATTEMPTS):
        try:
            return _read(folder)
        except CorruptStoreError:
            # It may have been replaced twice between two reads of ours: only a second look can tell.
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def problems(store: Path) -> Iterator[str]:
    """A sentence for each thing that is wrong with a store's models."""
    for name in names(store):
        try:
            read(store / MODELS / name).require_whole()
        except StoreError as error:
            yield str(error)


def _commit(
    folder: Path,
    kind: str,
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    tables: Mapping[str, pa.Table],
) -> None:
    current = _current(folder)
    version = 1 + max((int(path.name[:8]) for path in _versions(folder, lambda number: True)), default=0)
    for path in _versions(folder, lambda number: number != current):
        path.unlink()
    files = list(_files(version, tensors, tables))
    listed = [(name, len(data), zlib.crc32(data)) for name, data in files]
    created = datetime.now().astimezone().isoformat(timespec="seconds")
    told = {"format_version": FORMAT_VERSION, "kind": kind, "created": created, "files": listed, **description}
    text = json.dumps(told, indent=1).encode()
    try:
        for name, data in [*files, (f"{version:08d}.json", text)]:
            replace_file(folder / name, data)
        replace_file(folder / HEAD, f"{version} {zlib.crc32(text):08x}\n".encode())
    except BaseException:
        if _current(folder) != version:
            for path in _versions(folder, lambda number: number == version):
                path.unlink()
        raise


def _files(version: int, tensors: Mapping[str, Tensor], tables: Mapping[str, pa.Table]) -> Iterator[tuple[str, bytes]]:
    """Names and contents of a version's files, but for the description."""
    import pyarrow.parquet as pq
    import safetensors.torch

    yield f"{version:08d}.safetensors", safetensors.torch.save(dict(tensors))
    for name, table in tables.items():
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        yield f"{version:08d}.{name}.parquet", sink.getvalue().to_pybytes()


def _versions(folder: Path, chosen: Callable[[int], bool]) -> list[Path]:
    """The files of these versions."""
    numbered = [path for path in folder.iterdir() if _NUMBERED.match(path.name)]
    return [path for path in numbered if chosen(int(path.name[:8]))]


def _is_ours(path: Path) -> bool:
    return path.name in (HEAD, HEAD + ".tmp", LOCK) or _NUMBERED.match(path.name) is not None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time; the others wait, as it takes less than a second."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(folder: Path) -> SavedModel:
    before = stamp(folder)
    if before is None:
        raise UnknownNameError(f"there is no model in {folder}")
    version, crc = _head(folder)
    path = folder / f"{version:08d}.json"
    data = _bytes(path)
    if zlib.crc32(data) != crc:
        raise _damaged(path, f"does not fit {HEAD}")
    description = json.loads(data)
    if description["format_version"] != FORMAT_VERSION:
        raise StoreError(
            f"the model in {folder} is in version {description['format_version']} of the format, and this MetaQL reads"
            f" {FORMAT_VERSION}: update MetaQL, or train the model again"
        )
    return SavedModel(folder, version, before, description["kind"], description)


def _current(folder: Path) -> int | None:
    """The current version's number; None where there is none, or none that is known."""
    try:
        return _head(folder)[0]
    except CorruptStoreError:
        return None


def _head(folder: Path) -> tuple[int, int]:
    words = _bytes(folder / HEAD).split()
    try:
        return int(words[0]), int(words[1], 16)
    except (IndexError, ValueError):
        raise _damaged(folder / HEAD, "is not a version and its checksum") from None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise _damaged(path, "is missing") from None


def _damaged(path: Path, what: str) -> CorruptStoreError:
    return CorruptStoreError(f"{path} {what}: restore it from a backup, or train the model again and save it there")
