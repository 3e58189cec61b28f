"""Reads every byte of a store and compares sizes and checksums."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

from metaql.errors import MetaQLError, StoreError
from metaql.storage import saved_models
from metaql.storage.commit import read_manifest, require_store, versions
from metaql.storage.manifest import DataFile, Manifest
from metaql.storage.mapped_file import StoreFolder

_CHUNK_BYTES = 1 << 20


def check(path: str | Path) -> Iterator[str]:
    """Yields a sentence, with file and cure, for each thing that is wrong in any version; none when all is well.

    NotAStoreError when there is no store to check.
    """
    folder = Path(path)
    require_store(folder)
    seen: set[str] = set()
    try:
        current = read_manifest(folder)
    except StoreError as error:
        yield str(error)
        return
    yield from _check_version(folder, current, seen)
    for version in versions(folder):
        # A later one than the current was cut off before it was committed, and the next writer removes it.
        if version < current.version:
            yield from _check_old(folder, version, seen)
    yield from saved_models.problems(folder)


def _check_old(folder: Path, version: int, seen: set[str]) -> Iterator[str]:
    try:
        manifest = read_manifest(folder, version)
    except StoreError as error:
        yield str(error)
        return
    yield from _check_version(folder, manifest, seen)


def _check_version(folder: Path, manifest: Manifest, seen: set[str]) -> Iterator[str]:
    store = StoreFolder(folder, manifest)
    for whole in manifest.saved:
        if whole.path not in seen:
            seen.add(whole.path)
            yield from _problems(store, whole.path, whole.bytes, [(whole.bytes, whole.crc)])
    for collection in manifest.collections:
        for file in collection.files:
            if file.path not in seen:
                seen.add(file.path)
                yield from _problems(store, file.path, file.bytes, _parts(file))


def _parts(file: DataFile) -> list[tuple[int, int]]:
    return [(part.length, part.crc) for part in file.ranges]


def _problems(store: StoreFolder, path: str, size: int, parts: list[tuple[int, int]]) -> Iterator[str]:
    try:
        _require(store, path, size, parts)
    except MetaQLError as error:
        yield str(error)


def _require(store: StoreFolder, path: str, size: int, parts: list[tuple[int, int]]) -> None:
    place = store.path / path
    try:
        found = place.stat().st_size
    except FileNotFoundError:
        raise store.missing(path) from None
    if found != size:
        raise store.damaged(path, f"has {found:,} bytes instead of {size:,}")
    with open(place, "rb") as file:
        for length, crc in parts:
            begin = file.tell()
            summed, left = 0, length
            while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
                summed, left = zlib.crc32(chunk, summed), left - len(chunk)
            if left or summed != crc:
                raise store.damaged(path, f"is changed (the checksum of bytes {begin} to {begin + length} is wrong)")
