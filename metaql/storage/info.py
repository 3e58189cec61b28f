"""A store at a glance, without touching its gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metaql.storage.commit import read_manifest, versions
from metaql.storage.manifest import Collection, Manifest


@dataclass(frozen=True)
class Info:
    """What ``metaql info`` prints: as text by ``str``; ``bytes`` are those of the current version."""

    path: Path
    manifest: Manifest
    versions: tuple[int, ...]
    bytes: int

    def __str__(self) -> str:
        manifest = self.manifest
        parameters = sum(layer.width for layer in manifest.layers)
        older = len(self.versions) - 1
        lines = [
            f"store        {self.path} (id {manifest.id})",
            f"version      {manifest.version}, {older} older (`metaql vacuum` removes them)",
            f"created      {manifest.created}",
            f"model        {manifest.model or 'none yet'}, {len(manifest.layers)} layers, {parameters:,} parameters",
            f"stored       {self.bytes / 1e6:,.1f} MB as {manifest.dtype or 'nothing yet'}",
            f"checkpoints  {len(manifest.checkpoints)}",
            f"collections  {len(manifest.collections)}",
            *(f"  {_line(one)}" for one in manifest.collections),
        ]
        fitted = [f"{one.method} at checkpoint {one.checkpoint}" for one in manifest.curvatures]
        return "\n".join([*lines, *([f"curvature    {', '.join(fitted)}"] if fitted else [])])


def info(path: str | Path) -> Info:
    """The current version of the store at ``path``, summed up."""
    folder = Path(path)
    manifest = read_manifest(folder)
    data = sum(file.bytes for collection in manifest.collections for file in collection.files)
    whole = sum(one.bytes for one in manifest.saved)
    committed = tuple(version for version in versions(folder) if version <= manifest.version)
    return Info(folder, manifest, committed, data + whole)


def _line(collection: Collection) -> str:
    when = "trajectory" if collection.checkpoint is None else f"checkpoint {collection.checkpoint}"
    size = sum(file.bytes for file in collection.files)
    kept = ["logits"] if collection.logits else []
    if collection.embeddings:
        kept.append(f"embeddings of {', '.join(one.layer or repr('') for one in collection.embeddings)}")
    return (
        f"{collection.number:<4} {collection.split:<16} {when:<16} {collection.rows:>12,} rows {size / 1e6:>12,.1f} MB"
        f"{', with ' if kept else ''}{' and '.join(kept)}"
    )
