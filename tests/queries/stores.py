"""Small random stores, and beside each one what is in it: every relation as plain rows with float64 gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from metaql.storage.blocks import lay_out
from metaql.storage.schema import Layer
from metaql.storage.tables import STEPS
from metaql.storage.writer import Writer
from tests.conftest import small_block, small_layers, tied_layer

Row = dict[str, Any]


@dataclass(frozen=True)
class Collected:
    """A collection to record: ``steps`` in place of a checkpoint for one along a trajectory."""

    split: str
    ids: tuple[int, ...]
    checkpoint: int | None = 1
    steps: tuple[int, ...] = ()


@dataclass(frozen=True)
class Recipe:
    """What to record; ``label`` gives the metadata of a sample by its split and id."""

    layers: tuple[str, ...]
    checkpoints: int
    collections: tuple[Collected, ...]
    label: Callable[[str, int], int | None]
    dtype: str = "float32"


@dataclass
class PlainStore:
    """The relations of a store by name, read from what was recorded and not from the store."""

    layers: tuple[Layer, ...]
    relations: dict[str, list[Row]] = field(default_factory=dict)

    @property
    def modules(self) -> list[str]:
        return [layer.name for layer in self.layers]

    def mask(self, pattern: str) -> np.ndarray:
        """1 where a laid-out gradient belongs to the pattern."""
        parameters = [parameter for layer in self.layers for parameter in layer.parameters]
        return np.concatenate(
            [np.full(one.width, float(_selects(pattern, one.name)), dtype=np.float64) for one in parameters]
        )


def _selects(pattern: str, name: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def record(path: Path, recipe: Recipe, seed: int) -> PlainStore:
    """Records the recipe at a path; labels, losses and gradients are random, small and exact in every type."""
    rng = np.random.default_rng(seed)
    layers = tuple(
        layer for layer in (*small_layers(recipe.dtype), tied_layer(recipe.dtype)) if layer.name in recipe.layers
    )
    plain = PlainStore(layers)
    with Writer.open(path) as writer:
        writer.define("Net", layers, recipe.dtype)
        plain.relations["checkpoints"] = _record_checkpoints(writer, recipe.checkpoints)
        rows = [row for one in recipe.collections for row in _record_collection(writer, rng, layers, one, recipe)]
    _fill(plain, recipe, rows)
    return plain


def _record_checkpoints(writer: Writer, count: int) -> list[Row]:
    rows = []
    for place in range(count):
        settings = {"epoch": place, "learning_rate": 0.5 / (place + 1)}
        number = writer.add_checkpoint({"w": torch.ones(1)}, f"{place}", 10 * place, settings)
        rows.append({"checkpoint": number, "step": 10 * place, **settings})
    return rows


def _record_collection(
    writer: Writer, rng: np.random.Generator, layers: tuple[Layer, ...], one: Collected, recipe: Recipe
) -> list[Row]:
    """Rows with everything that any relation says of them."""
    collection = writer.collection(one.split, one.checkpoint)
    ids, rows = np.array(one.ids, dtype=np.int64), []
    for step in one.steps or (None,):
        blocks = {layer.name: small_block(rng, layer, len(ids)) for layer in layers}
        losses, predictions = rng.integers(1, 9, len(ids)) / 4, rng.integers(0, 3, len(ids))
        collection.append(ids, blocks, losses, predictions, losses.astype(np.float32) / 4, step)
        gradients = np.concatenate([lay_out(each, blocks[each.name]).double().numpy() for each in layers], axis=1)
        moment = {"split": one.split, "checkpoint": one.checkpoint, "step": step}
        for place, number in enumerate(one.ids):
            loss = float(losses[place])
            outputs = {"loss": loss, "prediction": int(predictions[place]), "confidence": loss / 4}
            rows.append({"sample_id": number, **moment, **outputs, "gradient": gradients[place]})
    labels = pa.array([recipe.label(one.split, number) for number in one.ids], pa.int64())
    steps = pa.Table.from_pylist(_steps(one.steps), STEPS) if one.steps else None
    collection.finish(pa.table({"sample_id": ids, "label": labels}), steps=steps)
    return rows


def _steps(steps: tuple[int, ...]) -> list[Row]:
    settings = {"parameter_group": 0, "momentum": 0.0, "batch_size": 4, "reduction": "mean"}
    return [{"step": step, "epoch": 0, "learning_rate": 0.25 * (step + 1), **settings} for step in steps]


def _fill(plain: PlainStore, recipe: Recipe, rows: list[Row]) -> None:
    """The relations that rows are seen in."""
    moments, outputs = ("sample_id", "split", "checkpoint", "step"), ("loss", "prediction", "confidence")
    plain.relations["gradients"] = [_only(row, (*moments, "gradient")) for row in rows]
    plain.relations["outputs"] = [_only(row, (*moments, *outputs)) for row in rows]
    keys = sorted({(row["split"], row["sample_id"]) for row in rows})
    plain.relations["samples"] = [
        {"sample_id": number, "split": split, "label": recipe.label(split, number)} for split, number in keys
    ]
    plain.relations["layers"] = [{"layer": layer.name, "kind": layer.kind} for layer in plain.layers]
    plain.relations["steps"] = [row for one in recipe.collections for row in _steps(one.steps)]
    for split in {one.split for one in recipe.collections}:
        plain.relations[split] = _split(plain, split, rows)


def _split(plain: PlainStore, split: str, rows: list[Row]) -> list[Row]:
    """The newest checkpoint's rows with their metadata."""
    newest = max(row["checkpoint"] or 0 for row in rows if row["split"] == split)
    labels = {row["sample_id"]: row["label"] for row in plain.relations["samples"] if row["split"] == split}
    kept = ("sample_id", "split", "loss", "prediction", "confidence", "gradient")
    found = [_only(row, kept) for row in rows if row["split"] == split and row["checkpoint"] == newest]
    return [{**row, "label": labels[row["sample_id"]]} for row in found]


def _only(row: Row, names: tuple[str, ...]) -> Row:
    return {name: row[name] for name in names}


def _every(split: str, count: int, checkpoints: int, first: int = 0) -> tuple[Collected, ...]:
    ids = tuple(range(first, first + count))
    return tuple(Collected(split, ids, number) for number in range(1, checkpoints + 1))


def _thirds(split: str, number: int) -> int | None:
    """0, 1, 2 with a NULL here and there, at other ids in each split."""
    return None if number % 5 == (3 if split == "train" else 1) else number % 3


EVERY_LAYER = tuple(layer.name for layer in small_layers())
POOL = (
    # Every kind of layer; each split at both checkpoints; the same ids in all splits.
    Recipe(
        (*EVERY_LAYER, "shared"),
        2,
        (*_every("train", 8, 2), *_every("validation", 5, 2), *_every("test", 3, 2)),
        _thirds,
    ),
    # One query sample, three checkpoints.
    Recipe(("fc1", "block.words", "head"), 3, (*_every("train", 6, 3), *_every("validation", 1, 3)), _thirds),
    # More rows than layers, ids that overlap in part, labels that are rarely there.
    Recipe(
        ("fc1", "head"),
        1,
        (*_every("train", 14, 1), *_every("validation", 9, 1, 10)),
        lambda split, number: number % 2 if number % 4 == 2 else None,
    ),
    # A trajectory beside a checkpoint.
    Recipe(
        ("fc1", "block.image", "scale"),
        1,
        (
            *_every("train", 6, 1),
            *_every("validation", 4, 1),
            Collected("train", (0, 1, 2, 3), None, (0, 1, 2)),
        ),
        _thirds,
    ),
    # Other types of numbers; classes that only one side has.
    Recipe(
        ("fc1", "block.grouped", "table"),
        2,
        (*_every("train", 7, 2), *_every("validation", 6, 2)),
        lambda split, number: number % 2 if split == "train" else 1 + number % 2,
        "float64",
    ),
    Recipe(("fc1", "shared"), 1, (*_every("train", 7, 1), *_every("validation", 5, 1)), _thirds, "bfloat16"),
)
