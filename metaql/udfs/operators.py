"""What the table functions over gradients share (``p2p``, ``p2b``, …, ``hydra``): their arguments and their sides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metaql.errors import QueryError, UnknownNameError
from metaql.udfs.quoting import literal, quoted
from metaql.udfs.sources import StoreSource
from metaql.udfs.table_functions import Asked, TableFunction


@dataclass(frozen=True)
class Call:
    """The arguments of a short form, in their order; SQL may give NULL for any."""

    train: str | None = "train"
    query: str | None = "validation"
    layers: str | None = "*"
    checkpoint: int | None = None


SIDES = ("train", "query")


def operator(name: str, columns: tuple[str, ...], sql: str, fill: Callable[[Asked], dict[str, str]]) -> TableFunction:
    """A short form: its name, its columns, and the SQL it stands for.

    The sides of that SQL are called after the arguments, so that DuckDB's errors make sense to the caller, and it
    restricts one gradient of the two to the layers asked for, ``{query_gradient}`` or ``{train_gradient}``: that
    of the side that is averaged first. ``fill`` gives what stands for each side, and what else is in braces.

    QueryError and UnknownNameError for arguments that can't be meant so; whether relations have the columns is left to
    DuckDB, which sees what the caller sees.
    """

    def stands_for(asked: Asked) -> str:
        layers = asked.call.layers
        if not layers:
            raise QueryError(f"{asked.where('layers')}: give a layer pattern, or '*' for all layers")
        if layers != "*":
            asked.source.space.select(layers)
        filled = fill(asked)
        gradients = {f"{side}_gradient": _restricted(f"{side}.gradient", layers) for side in SIDES}
        return sql.format(**filled, **gradients)

    return TableFunction(name, columns, Call, stands_for, ("VARCHAR", "VARCHAR", "VARCHAR", "BIGINT"))


def both_sides(asked: Asked) -> dict[str, str]:
    """``train`` and ``query``, as they are asked for: a relation as it is, or a split at the call's checkpoint."""
    return {side: side_of(asked, side) for side in SIDES}


def relation(asked: Asked, side: str) -> str:
    """What stands in FROM for ``train`` or ``query``, whatever the call's checkpoint."""
    return asked.relation(side, "sample_id and gradient")


def side_of(asked: Asked, side: str) -> str:
    """A relation as it is, or a split at the call's checkpoint."""
    text, checkpoint = getattr(asked.call, side), asked.call.checkpoint
    if text is None or checkpoint is None:
        return relation(asked, side)
    return _split_at(asked.where(side), text, checkpoint, asked.source)


def _restricted(gradient: str, layers: str) -> str:
    return gradient if layers == "*" else f"layers({gradient}, {literal(layers)})"


def _split_at(where: str, text: str, checkpoint: int, source: StoreSource) -> str:
    """A split's gradients at a checkpoint, where there are any."""
    collected: dict[str, set[int]] = {}
    for collection in source.store.manifest.collections:
        if collection.checkpoint is not None:
            collected.setdefault(collection.split, set()).add(collection.checkpoint)
    split = next((split for split in collected if split.lower() == text.lower()), None)
    if split is None:
        raise QueryError(
            f"{where}: with a checkpoint it must be one of the splits {', '.join(collected)}. A SELECT from gradients"
            " can say itself which checkpoint it wants"
        )
    if checkpoint not in collected[split]:
        there = ", ".join(map(str, sorted(collected[split])))
        raise UnknownNameError(
            f"{where}: there are no gradients of '{split}' at checkpoint {checkpoint}, but at {there}"
        )
    return (
        f"(SELECT sample_id, gradient FROM {quoted(source.name)}.main.gradients"
        f" WHERE split = {literal(split)} AND checkpoint = {checkpoint})"
    )
