"""The one writer of a store: holds the lock, adds checkpoints, opens collections, commits.

A group of ranks is one writer: each of them writes collections of its own, and rank 0, which holds the lock, moves
them to their places and commits all with one manifest. All ranks call the same methods, within ``Group.together``.
"""

from __future__ import annotations

import io
import json
import secrets
import socket
import zlib
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metaql.errors import NotAStoreError, RecordingError, StoreError
from metaql.storage import manifest as updates
from metaql.storage.collection_writer import CollectionWriter
from metaql.storage.commit import begin, commit, is_unfinished, read_manifest, require_store, versions
from metaql.storage.durable import replace_file, sync, writing
from metaql.storage.group import ALONE, Group
from metaql.storage.lock import WriterLock
from metaql.storage.manifest import Checkpoint, Collection, Curvature, Manifest
from metaql.storage.placing import Placed, place
from metaql.storage.recovery import (
    CHECKPOINTS,
    COLLECTIONS,
    CURVATURES,
    INTENT,
    RECORDING,
    recover,
    remove,
    remove_unnamed,
)
from metaql.storage.schema import Layer
from metaql.storage.staging import BufferPool

Update = Callable[[Manifest], Manifest]


class Writer:
    """Writes to a store until closed; use ``Writer.open``, and as a context manager if you like."""

    def __init__(self, path: Path, lock: WriterLock | None, manifest: Manifest, group: Group, name: str) -> None:
        self.path = path
        self.manifest = manifest
        self._lock = lock
        self._group = group
        self._name = name
        self._definition: Update | None = None
        self._layers = manifest.layers
        self._open: list[CollectionWriter] = []
        self._begun = 0
        self._pool = BufferPool()

    @classmethod
    def open(cls, path: str | Path, *, overwrite: bool = False, group: Group = ALONE) -> Writer:
        """Continues the store at ``path``, or begins one there; ``overwrite`` removes what a store holds.

        NotAStoreError for a folder that holds something else, StoreLockedError while somebody else writes. What
        a crash left uncommitted is removed with a warning. ``group`` are the ranks that write together.
        """
        folder = Path(path)
        lock: WriterLock | None = None
        try:
            with group.together("Recorder"):
                begun = None
                if group.leads:
                    lock = _locked(folder)
                    begun = _begin_or_continue(folder, overwrite)
                # With a name for folders that no rank of an earlier run, still about to end, takes for its own.
                manifest, leaders_folder, run = group.gather((begun, folder.absolute(), secrets.token_hex(4)))[0]
                assert manifest is not None
                if not group.leads:
                    _require_same_folder(folder, manifest, leaders_folder)
            return cls(folder, lock, manifest, group, f"-{group.rank}-{run}" if group.size > 1 else "")
        except BaseException:
            if lock is not None:
                lock.release()
            raise

    def define(self, model: str, layers: tuple[Layer, ...], dtype: str, losses: str | None = None) -> None:
        """Says what is recorded, and by what name the losses go; from the next commit on it can't be changed."""
        if self.manifest.model is not None:
            self._require_same(model, layers)
            return
        self._layers = layers
        self._definition = lambda manifest: updates.define(manifest, model, losses, dtype, layers)

    def add_checkpoint(
        self, weights: Mapping[str, Tensor], digest: str, step: int | None, settings: Mapping[str, Any]
    ) -> int:
        """Saves the weights and commits; returns the checkpoint's number."""
        number = self.manifest.next_checkpoint

        def update(path: str, size: int, crc: int) -> Update:
            saved = Checkpoint(number, path, size, crc, digest, step, dict(settings))
            return lambda manifest: updates.add_checkpoint(manifest, saved)

        self._add_file(f"{CHECKPOINTS}/{number:08d}.pt", weights, update)
        return number

    def add_curvature(
        self,
        tensors: Mapping[str, Tensor],
        checkpoint: int,
        method: str,
        labels: str,
        samples: int,
        eigenvalues: Mapping[str, float],
    ) -> None:
        """Saves what was fitted at the checkpoint, in place of what the method had fitted there, and commits."""
        number = self.manifest.next_curvature

        def update(path: str, size: int, crc: int) -> Update:
            fitted = Curvature(number, checkpoint, method, labels, samples, path, size, crc, eigenvalues)
            return lambda manifest: updates.add_curvature(manifest, fitted)

        self._add_file(f"{CURVATURES}/{number:08d}.pt", tensors, update)

    def _add_file(self, path: str, tensors: Mapping[str, Tensor], update: Callable[[str, int, int], Update]) -> None:
        """Saves tensors and commits what ``update`` makes of the path, the file's bytes and its CRC32."""
        try:
            size, crc = self._group.lead(lambda: self._save(path, tensors))
            self._commit(update(path, size, crc))
        except BaseException:
            if path not in self.manifest.paths and self._group.leads:
                (self.path / path).unlink(missing_ok=True)
                (self.path / f"{path}.tmp").unlink(missing_ok=True)
            raise

    def collection(self, split: str, checkpoint: int | None) -> CollectionWriter:
        """Begins a collection; several may be open at once, and become visible as each is finished."""
        if not self._layers:
            raise RecordingError("Say what is recorded (define) before beginning a collection.")
        self._begun += 1
        folder = self.path / RECORDING / f"{self._begun:08d}{self._name}"
        with writing(folder):
            folder.mkdir(parents=True)
            (folder / INTENT).write_text(json.dumps({"split": split, "checkpoint": checkpoint}))
        writer = CollectionWriter(
            folder, self._layers, split, checkpoint, self._commit_collection, self._discard, self._pool
        )
        self._open = [one for one in self._open if not one.closed] + [writer]
        return writer

    def close(self) -> None:
        """Aborts collections that were not finished and lets others write; harmless when done before."""
        try:
            while self._open:
                self._open.pop().abort()
            self._discard_remnants()
        finally:
            if self._lock is not None:
                self._lock.release()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _commit(self, update: Update) -> None:
        define = self._definition or (lambda manifest: manifest)
        try:
            self.manifest = self._group.lead(
                lambda: commit(self.path, self.manifest, lambda manifest: update(define(manifest)))
            )
        except BaseException:
            # Only the disk knows whether an interrupt came before or after the pointer moved.
            self._reread()
            raise
        finally:
            if self.manifest.model is not None:
                self._definition = None

    def _reread(self) -> None:
        try:
            self.manifest = read_manifest(self.path)
        except (StoreError, OSError):
            return

    def _save(self, path: str, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """Brings tensors to the disk; returns the file's bytes and CRC32."""
        # By way of memory: torch turns a refusal of the disk into errors of its own, or ends the process.
        buffer = io.BytesIO()
        torch.save(dict(tensors), buffer)
        data = buffer.getbuffer()
        with writing(self.path / path):
            (self.path / path).parent.mkdir(exist_ok=True)
            replace_file(self.path / path, data)
            sync(self.path)
        return len(data), zlib.crc32(data)

    def _commit_collection(self, folder: Path, collection: Collection) -> None:
        """Moves the collection of each rank to its place, gives them their rows and commits them all at once."""
        parts = self._group.gather((folder.name, collection))
        placed = place(parts, self.manifest)
        try:
            self._group.lead(lambda: self._move(placed))
            self._commit(lambda manifest: reduce(updates.add_collection, (one.collection for one in placed), manifest))
        except BaseException:
            for one in placed:
                if self._group.leads and one.collection.row_file.path not in self.manifest.paths:
                    self._discard(self.path / one.folder)
            raise
        if len(placed) < len(parts):
            self._discard(folder)

    def _move(self, placed: Sequence[Placed]) -> None:
        with writing(self.path / COLLECTIONS):
            (self.path / COLLECTIONS).mkdir(exist_ok=True)
            sync(self.path)
            for one in placed:
                folder = self.path / RECORDING / one.name
                (folder / INTENT).unlink()
                sync(folder)
                folder.rename(self.path / one.folder)
            sync(self.path / COLLECTIONS)

    def _discard(self, folder: Path) -> None:
        """Removes an uncommitted folder; what the disk refuses to remove, the next writer will."""
        try:
            remove(folder)
        except StoreError:
            return

    def _discard_remnants(self) -> None:
        """Removes what an interrupt at an unlucky moment kept a collection from removing itself."""
        if self._lock is not None and self._lock.held and (self.path / RECORDING).is_dir():
            for folder in (self.path / RECORDING).iterdir():
                self._discard(folder)

    def _require_same(self, model: str, layers: tuple[Layer, ...]) -> None:
        if layers == self.manifest.layers:
            return
        before = {layer.name: layer for layer in self.manifest.layers}
        now = {layer.name: layer for layer in layers}
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        raise RecordingError(
            f"{self.path} holds the gradients of another model or of other layers ({self.manifest.model}, here "
            f"{model}): {', '.join(differing) or 'their order'} differ. Record to another folder, or with "
            "overwrite=True to remove what is there."
        )


def _locked(folder: Path) -> WriterLock:
    """The lock of the store at the folder, which is made if need be."""
    with writing(folder):
        if not folder.exists():
            folder.mkdir(parents=True)
    if not (folder.is_dir() and is_unfinished(folder)):
        require_store(folder)
    return WriterLock(folder)


def _require_same_folder(folder: Path, manifest: Manifest, leaders: Path) -> None:
    """Raises unless this folder is the one that rank 0 has."""
    try:
        found: Manifest | None = read_manifest(folder)
    except StoreError:
        found = None
    if found is None or (found.id, found.version) != (manifest.id, manifest.version):
        raise NotAStoreError(
            f"{folder.absolute()} on {socket.gethostname()} is not the store that rank 0 writes to at {leaders}. Give "
            "every rank the same path, in a file system that all of them share."
        )


def _begin_or_continue(folder: Path, overwrite: bool) -> Manifest:
    if overwrite or is_unfinished(folder):
        version = 1 if is_unfinished(folder) else max(versions(folder), default=0) + 1
        created = datetime.now(UTC).isoformat(timespec="seconds")
        manifest = begin(folder, Manifest(id=secrets.randbelow(2**63 - 1) + 1, version=version, created=created))
        remove_unnamed(folder, manifest)
        return manifest
    manifest = read_manifest(folder)
    recover(folder, manifest)
    return manifest
