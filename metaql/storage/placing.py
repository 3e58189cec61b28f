"""Where collections that are finished go: their folders' names and their rows' numbers in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from metaql.errors import RecordingError
from metaql.storage.manifest import Collection, DataFile, Manifest
from metaql.storage.recovery import COLLECTIONS


@dataclass(frozen=True)
class Placed:
    """A collection as the next manifest will name it: recorded in a folder of this name, to be moved to ``folder``."""

    name: str
    folder: str
    collection: Collection


def place(parts: Sequence[tuple[str, Collection]], manifest: Manifest) -> list[Placed]:
    """The collections that the ranks recorded in folders of these names, one after another behind the manifest's.

    A rank without rows or steps has none, unless it is alone. RecordingError if they are not of one split.
    """
    _require_same_moment([part for _, part in parts])
    placed: list[Placed] = []
    number, row = manifest.next_collection, manifest.next_row
    for name, part in parts:
        if part.rows or part.steps or len(parts) == 1:
            folder = f"{COLLECTIONS}/{number:08d}"
            placed.append(Placed(name, folder, _put(part, number, folder, row)))
            number, row = number + 1, row + part.rows
    return placed


def _require_same_moment(parts: Sequence[Collection]) -> None:
    if len({(part.split, part.checkpoint) for part in parts}) > 1:
        given = ", ".join(f"'{part.split}' by rank {rank}" for rank, part in enumerate(parts))
        raise RecordingError(f"The ranks record different splits at once: {given}. Give every rank the same split.")


def _put(collection: Collection, number: int, folder: str, first_row: int) -> Collection:
    """A collection whose paths and rows count from its own beginning, with the store's paths and rows."""

    def put(file: DataFile) -> DataFile:
        return replace(file, path=f"{folder}/{file.path}")

    inputs = collection.inputs
    return replace(
        collection,
        number=number,
        first_row=first_row,
        row_file=put(collection.row_file),
        metadata=put(collection.metadata) if collection.metadata else None,
        steps=put(collection.steps) if collection.steps else None,
        inputs=replace(inputs, file=put(inputs.file)) if inputs and inputs.file else inputs,
        logits=put(collection.logits) if collection.logits else None,
        embeddings=tuple(replace(one, file=put(one.file)) for one in collection.embeddings),
        segments=tuple(
            replace(one, first_row=one.first_row + first_row, file=put(one.file)) for one in collection.segments
        ),
    )
