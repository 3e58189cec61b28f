"""The pointer ``HEAD``, the manifests it points to, and the one way to move it on.

``HEAD`` holds one line: the number of the current manifest and the CRC32 of that manifest's file, so that a
flipped digit can't quietly bring back an older version.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from metaql.errors import CommitConflictError, CorruptStoreError, NotAStoreError, RecordingError, StoreError
from metaql.storage.durable import replace_file, writing
from metaql.storage.manifest import Manifest
from metaql.storage.manifest_json import decode, encode

HEAD = "HEAD"
MANIFESTS = "manifests"
_ATTEMPTS = 5


def manifest_path(folder: Path, version: int) -> Path:
    """Where a version's manifest lies."""
    return folder / MANIFESTS / f"{version:08d}.json"


def versions(folder: Path) -> list[int]:
    """The versions whose manifests lie in the folder, oldest first; some may never have been committed."""
    names = (path.stem for path in (folder / MANIFESTS).glob("*.json"))
    return sorted(int(name) for name in names if name.isdigit())


def read_manifest(folder: Path, version: int | None = None) -> Manifest:
    """The current manifest, or that of an older version that is not vacuumed yet."""
    require_store(folder)
    if version is not None:
        return _old(folder, version)
    for attempt in range(_ATTEMPTS):
        try:
            return _current(folder)
        except CorruptStoreError:
            # A writer may have moved on and vacuumed between our two reads: only a second look can tell.
            if attempt == _ATTEMPTS - 1:
                raise
    raise AssertionError


def commit(folder: Path, base: Manifest, update: Callable[[Manifest], Manifest]) -> Manifest:
    """Makes ``update(base)`` the current version, provided that ``base`` still is.

    The caller holds the writer's lock and has brought every file that the update names to the disk.
    """
    new = replace(update(base), version=base.version + 1)
    try:
        data = encode(new)
    except (TypeError, ValueError) as error:
        raise RecordingError(
            f"The settings of a checkpoint can be numbers, strings, booleans, None, and lists of these: {error}."
        ) from error
    path = manifest_path(folder, new.version)
    _require_version(folder, base.version)
    with writing(path):
        replace_file(path, data)
    _require_version(folder, base.version)
    with writing(folder / HEAD):
        replace_file(folder / HEAD, f"{new.version} {zlib.crc32(data):08x}\n".encode())
    return new


def begin(folder: Path, manifest: Manifest) -> Manifest:
    """Makes a manifest the current one, whatever there was before: how a store begins."""
    data = encode(manifest)
    with writing(folder):
        (folder / MANIFESTS).mkdir(exist_ok=True)
        replace_file(manifest_path(folder, manifest.version), data)
        replace_file(folder / HEAD, f"{manifest.version} {zlib.crc32(data):08x}\n".encode())
    return manifest


def head(folder: Path) -> tuple[int, int]:
    """The current version and the CRC32 of its manifest's file."""
    path = folder / HEAD
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CorruptStoreError(f"{path} is missing: {_cure(folder)}.") from None
    words = text.split(b" ")
    if len(words) != 2 or not words[0].isdigit() or len(words[1]) != 9 or not text.endswith(b"\n"):
        raise CorruptStoreError(f"{path} is not a version and its checksum any more: {_cure(folder)}.")
    try:
        return int(words[0]), int(words[1], 16)
    except ValueError:
        raise CorruptStoreError(f"{path} is not a version and its checksum any more: {_cure(folder)}.") from None


def _require_version(folder: Path, version: int) -> None:
    current = head(folder)[0]
    if current != version:
        raise CommitConflictError(
            f"{folder} is at version {current}, where version {version} was expected: somebody else "
            "committed without the writer's lock. Open the store again and record again."
        )


def require_store(folder: Path) -> None:
    """NotAStoreError, saying what is there instead, unless the folder looks like a store."""
    if not folder.exists():
        raise NotAStoreError(f"There is no store at {folder}: no such folder. Check the path, or record one there.")
    if not folder.is_dir():
        raise NotAStoreError(f"{folder} is a file; a store is a folder. Give the folder that was recorded to.")
    if is_unfinished(folder):
        raise NotAStoreError(f"There is no store at {folder} yet: the folder is empty. Record to it first.")
    if not (folder / HEAD).exists() and not (folder / MANIFESTS).is_dir():
        raise NotAStoreError(f"{folder} is not a store: it has neither {HEAD} nor {MANIFESTS}/. Check the path.")


def is_unfinished(folder: Path) -> bool:
    """Whether the folder is empty, or holds no more than a store whose very first commit was cut off."""
    names = {path.name for path in folder.iterdir()}
    return names <= {"writer.lock", MANIFESTS, HEAD + ".tmp"} and set(versions(folder)) <= {1}


def _current(folder: Path) -> Manifest:
    version, crc = head(folder)
    path = manifest_path(folder, version)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorruptStoreError(f"{path}, which {HEAD} names, is missing: {_cure(folder)}.") from None
    manifest = decode(data, path, _cure(folder))
    if zlib.crc32(data) != crc or manifest.version != version:
        raise CorruptStoreError(f"{folder / HEAD} does not fit {path}, one is changed: {_cure(folder)}.")
    return manifest


def _old(folder: Path, version: int) -> Manifest:
    path = manifest_path(folder, version)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        there = ", ".join(map(str, versions(folder)))
        raise StoreError(f"{folder} has no version {version} (any more); it has {there}.") from None
    return decode(data, path, _cure(folder))


def _cure(folder: Path) -> str:
    """What to do about a damaged pointer or manifest: a backup, or the newest version that is whole."""
    for version in reversed(versions(folder)):
        data = manifest_path(folder, version).read_bytes()
        try:
            decode(data, manifest_path(folder, version), "")
        except StoreError:
            continue
        line = f"{version} {zlib.crc32(data):08x}"
        return f"restore it from a backup, or go back to version {version} by writing the line '{line}' to {HEAD}"
    return "restore it from a backup, or record again with overwrite=True"
