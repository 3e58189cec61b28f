"""Finds and removes files that no manifest names: what a crash left, or what a vacuum frees."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from metaql.storage.commit import MANIFESTS, manifest_path
from metaql.storage.durable import sync, writing
from metaql.storage.manifest import Manifest

CHECKPOINTS = "checkpoints"
COLLECTIONS = "collections"
CURVATURES = "curvatures"
RECORDING = "recording"
INTENT = "intent.json"


def recover(folder: Path, manifest: Manifest) -> None:
    """Removes what was never committed, and warns, saying what it was. The caller holds the writer's lock."""
    lost = [*_entries(folder / RECORDING), *_numbered(folder / COLLECTIONS, manifest.next_collection)]
    lost += _numbered(folder / CHECKPOINTS, manifest.next_checkpoint)
    lost += _numbered(folder / CURVATURES, manifest.next_curvature)
    told = [_describe(path) for path in lost]
    places = (folder, *(folder / name for name in (MANIFESTS, CHECKPOINTS, CURVATURES)))
    temporary = [path for place in places for path in place.glob("*.tmp")]
    remnants = [*temporary, *_numbered(folder / MANIFESTS, manifest.version + 1)]
    for path in [*lost, *remnants]:
        remove(path)
    if told:
        warnings.warn(
            f"The last recording to {folder} was cut off, and what it had not committed is removed: "
            f"{'; '.join(told)}. Everything committed is intact. Record the missing part again.",
            stacklevel=4,
        )


def remove_unnamed(folder: Path, manifest: Manifest) -> int:
    """Removes every file that this manifest doesn't name, older manifests first; returns the bytes freed."""
    old = [path for path in _entries(folder / MANIFESTS) if path != manifest_path(folder, manifest.version)]
    freed = sum(remove(path) for path in old)
    freed += sum(remove(path) for path in [*_entries(folder / RECORDING), *folder.glob("*.tmp")])
    named = manifest.paths
    data = [*_entries(folder / CHECKPOINTS), *_entries(folder / CURVATURES), *(folder / COLLECTIONS).glob("*/*")]
    freed += sum(remove(path) for path in data if path.relative_to(folder).as_posix() not in named)
    for path in _entries(folder / COLLECTIONS):
        if not any(path.iterdir()):
            remove(path)
    return freed


def remove(path: Path) -> int:
    """Removes a file, or a folder with all that is in it; returns its bytes."""
    size = _bytes(path)
    with writing(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        sync(path.parent)
    return size


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _numbered(folder: Path, first: int) -> Iterator[Path]:
    """Entries whose number is at least ``first``."""
    for path in _entries(folder):
        if path.stem.isdigit() and int(path.stem) >= first:
            yield path


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def _describe(path: Path) -> str:
    size = f"{_bytes(path) / 1e6:.1f} MB"
    if path.is_file():
        return f"{'curvature' if path.parent.name == CURVATURES else 'checkpoint'} {int(path.stem)} ({size})"
    files = [file for file in path.iterdir() if file.name != INTENT]
    return f"{_intended(path)} ({len(files)} files, {size})"


def _intended(path: Path) -> str:
    """What was being recorded in this folder, in the user's words where they were noted."""
    try:
        intent = json.loads((path / INTENT).read_text())
        split, checkpoint = intent["split"], intent["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return "a collection"
    when = "along the trajectory" if checkpoint is None else f"at checkpoint {checkpoint}"
    return f"split '{split}' {when}"
