"""What a version of a store holds, and the ways in which one version becomes the next.

Everything here is frozen and touches no disk. A commit applies one of the functions at the end to the
manifest it starts from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from metaql.storage.schema import Layer


@dataclass(frozen=True)
class Range:
    """A stretch of a file's bytes, its CRC32 (zlib's), and how many rows it holds."""

    offset: int
    length: int
    crc: int
    rows: int


@dataclass(frozen=True)
class DataFile:
    """An Arrow file: its path within the store, and its header, record batches and footer, in that order."""

    path: str
    bytes: int
    ranges: tuple[Range, ...]

    @property
    def batches(self) -> tuple[Range, ...]:
        """The record batches."""
        return self.ranges[1:-1]

    @property
    def rows(self) -> int:
        """How many rows it holds."""
        return sum(part.rows for part in self.ranges)


@dataclass(frozen=True)
class Statistics:
    """Of a segment's positions: how many are kept, how many were zero and dropped, the extremes of a row."""

    positions: int
    dropped: int
    fewest: int
    most: int


@dataclass(frozen=True)
class Segment:
    """One layer's gradients for the rows ``first_row`` and following, in one form and one file.

    ``suffix_of`` names the layer whose segments hold the suffixes, for they are the same; None where this one does.
    """

    layer: str
    first_row: int
    rows: int
    form: str
    file: DataFile
    statistics: Statistics
    suffix_of: str | None = None


@dataclass(frozen=True)
class Inputs:
    """The samples' inputs: their common shape and torch dtype, and the file of them where they are kept."""

    file: DataFile | None
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Embeddings:
    """What one module of the model put out for each sample, and the file of it."""

    layer: str
    file: DataFile


@dataclass(frozen=True)
class Collection:
    """One pass of recording. ``checkpoint`` is None along a trajectory; its rows are the store's own numbers."""

    number: int
    split: str
    checkpoint: int | None
    first_row: int
    rows: int
    row_file: DataFile
    metadata: DataFile | None
    steps: DataFile | None
    inputs: Inputs | None
    segments: tuple[Segment, ...]
    logits: DataFile | None = None
    embeddings: tuple[Embeddings, ...] = ()

    @property
    def files(self) -> tuple[DataFile, ...]:
        """Every file it consists of."""
        inputs = self.inputs.file if self.inputs else None
        tables = (self.row_file, self.metadata, self.steps, inputs, self.logits)
        parts = [part.file for part in self.embeddings] + [part.file for part in self.segments]
        return (*(file for file in tables if file), *parts)


@dataclass(frozen=True)
class Checkpoint:
    """Saved weights, and the optimizer's settings at that moment. ``digest`` is the recorder's, of the weights."""

    number: int
    path: str
    bytes: int
    crc: int
    digest: str
    step: int | None
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Curvature:
    """Second moments of gradients at a checkpoint, and the file of what inverts them.

    ``labels`` is ``sampled`` from the model (the true Fisher matrix) or ``recorded`` (the empirical one).
    ``eigenvalues`` has each layer's mean one by its name.
    """

    number: int
    checkpoint: int
    method: str
    labels: str
    samples: int
    path: str
    bytes: int
    crc: int
    eigenvalues: Mapping[str, float]

    @property
    def serves(self) -> tuple[str, ...]:
        """The methods that it answers for: EK-FAC has all that K-FAC asks for."""
        return (self.method, "kfac") if self.method == "ekfac" else (self.method,)


CROSS_ENTROPY = "cross_entropy"


@dataclass(frozen=True)
class Manifest:
    """A version of a store. The ``next_`` counters only ever grow: no number is used for two things.

    ``losses`` is ``CROSS_ENTROPY`` for the recorder's default, else the name of the user's function.
    """

    id: int
    version: int
    created: str
    model: str | None = None
    losses: str | None = None
    dtype: str | None = None
    layers: tuple[Layer, ...] = ()
    next_row: int = 0
    next_checkpoint: int = 1
    next_collection: int = 1
    checkpoints: tuple[Checkpoint, ...] = field(default=())
    collections: tuple[Collection, ...] = field(default=())
    next_curvature: int = 1
    curvatures: tuple[Curvature, ...] = ()

    @property
    def saved(self) -> tuple[Checkpoint | Curvature, ...]:
        """What is kept as tensors in files of their own."""
        return (*self.checkpoints, *self.curvatures)

    @property
    def paths(self) -> frozenset[str]:
        """Every data file this version names, by its path within the store."""
        whole = {one.path for one in self.saved}
        return frozenset(whole | {file.path for collection in self.collections for file in collection.files})


def define(manifest: Manifest, model: str, losses: str | None, dtype: str, layers: tuple[Layer, ...]) -> Manifest:
    """With the model's and the losses' names and the layers that are recorded."""
    return replace(manifest, model=model, losses=losses, dtype=dtype, layers=layers)


def add_checkpoint(manifest: Manifest, checkpoint: Checkpoint) -> Manifest:
    """With one checkpoint more."""
    return replace(
        manifest,
        checkpoints=(*manifest.checkpoints, checkpoint),
        next_checkpoint=checkpoint.number + 1,
    )


def add_collection(manifest: Manifest, collection: Collection) -> Manifest:
    """With one collection more, whose rows begin at the manifest's next row."""
    return replace(
        manifest,
        collections=(*manifest.collections, collection),
        next_row=collection.first_row + collection.rows,
        next_collection=collection.number + 1,
    )


def add_curvature(manifest: Manifest, curvature: Curvature) -> Manifest:
    """With this curvature in place of one by the same method at the same checkpoint."""
    place = (curvature.checkpoint, curvature.method)
    others = tuple(one for one in manifest.curvatures if (one.checkpoint, one.method) != place)
    return replace(manifest, curvatures=(*others, curvature), next_curvature=curvature.number + 1)


def drop_checkpoint(manifest: Manifest, number: int) -> Manifest:
    """Without a checkpoint and all that was recorded at it."""
    return replace(
        manifest,
        checkpoints=tuple(one for one in manifest.checkpoints if one.number != number),
        collections=tuple(one for one in manifest.collections if one.checkpoint != number),
        curvatures=tuple(one for one in manifest.curvatures if one.checkpoint != number),
    )
