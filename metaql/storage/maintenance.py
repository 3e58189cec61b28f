"""What an owner does to a store from outside a recording: vacuum it, drop a checkpoint."""

from __future__ import annotations

from pathlib import Path

from metaql.errors import UnknownNameError
from metaql.storage import manifest as updates
from metaql.storage.commit import commit, read_manifest
from metaql.storage.lock import WriterLock
from metaql.storage.recovery import remove_unnamed


def vacuum(path: str | Path) -> int:
    """Removes older versions and all files that only they name; returns the bytes freed.

    StoreLockedError while somebody writes. Readers keep what they have opened; for the rest of an older version
    they get an error that says to connect again.
    """
    folder = Path(path)
    read_manifest(folder)
    lock = WriterLock(folder)
    try:
        return remove_unnamed(folder, read_manifest(folder))
    finally:
        lock.release()


def drop_checkpoint(path: str | Path, number: int) -> None:
    """Commits a version without this checkpoint and what was recorded at it; ``vacuum`` then frees the space.

    UnknownNameError, with those there are, when there is no such checkpoint.
    """
    folder = Path(path)
    read_manifest(folder)
    lock = WriterLock(folder)
    try:
        manifest = read_manifest(folder)
        numbers = [checkpoint.number for checkpoint in manifest.checkpoints]
        if number not in numbers:
            there = ", ".join(map(str, numbers)) or "none"
            raise UnknownNameError(f"There is no checkpoint {number} in {folder}. There are: {there}.")
        commit(folder, manifest, lambda current: updates.drop_checkpoint(current, number))
    finally:
        lock.release()
