"""The curvatures that loaded stores keep, as ``precondition`` asks for them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from metaql.errors import QueryError
from metaql.methods.curvature import LayerCurvature
from metaql.storage.curvatures import unpack
from metaql.storage.manifest import Curvature
from metaql.storage.store import Store
from metaql.udfs.definitions import Combination, Part, Replayed
from metaql.udfs.preconditioned import Preconditioned
from metaql.udfs.solved import Solved

if TYPE_CHECKING:
    from metaql.udfs.session import Session
    from metaql.udfs.vectors import Definition


@dataclass(frozen=True, eq=False)
class Fitted:
    """What inverts the curvature of each layer, by its name, by one method at one checkpoint of a store."""

    store: Store
    saved: Curvature
    method: str
    layers: Mapping[str, LayerCurvature]


class Curvatures:
    """Those that were asked for, each read once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._read: dict[tuple[int, int, str], Fitted] = {}

    def get(self, store: Store, method: str, checkpoint: int | None) -> Fitted:
        """That of the method at the checkpoint, by default the newest that has it; QueryError where there is none."""
        known = [one for one in store.manifest.curvatures if method in one.serves]
        found = [one for one in known if checkpoint in (None, one.checkpoint)]
        if not found:
            raise QueryError(_missing(store, method, checkpoint))
        newest = max(found, key=lambda one: (one.checkpoint, one.number))
        with self._lock:
            key = store.id, newest.number, method
            if key not in self._read:
                layers = unpack(store.layers, store.curvature(newest), method)
                self._read[key] = Fitted(store, newest, method, layers)
            return self._read[key]


def _missing(store: Store, method: str, checkpoint: int | None) -> str:
    there = ", ".join(f"'{one.method}' at checkpoint {one.checkpoint}" for one in store.manifest.curvatures)
    where = "" if checkpoint is None else f" at checkpoint {checkpoint}"
    return (
        f"curvature for '{method}' was not gathered{where} in {store.path} (there is {there or 'none'}): with a"
        f" Recorder on the model of that checkpoint, call recorder.curvature(data, '{method}'), and connect again"
    )


def require_of_checkpoint(session: Session, gradient: Combination, method: str, number: int) -> None:
    """QueryError for gradients of another checkpoint than the curvature's."""
    others = checkpoints(session, gradient) - {number}
    if others:
        told = ", ".join("a trajectory" if one is None else f"checkpoint {one}" for one in sorted(others, key=str))
        raise QueryError(
            f"precondition: this is a gradient of {told}, and the newest curvature for '{method}' is that of"
            f" checkpoint {number}. Gather it there too, or say that this one will do: checkpoint := {number}"
        )


def checkpoints(session: Session, gradient: Definition) -> set[int | None]:
    """The checkpoints of all that a vector consists of; None for a step of a trajectory."""
    if isinstance(gradient, Preconditioned | Solved):
        return checkpoints(session, gradient.gradient)
    if isinstance(gradient, Replayed):
        return {session.model(gradient.model).source.store.manifest.checkpoints[-1].number}
    assert isinstance(gradient, Combination)
    return set().union(*(_of_part(session, part) for part in gradient.parts))


def _of_part(session: Session, part: Part) -> set[int | None]:
    if part.store == session.id:
        return set().union(*(checkpoints(session, one) for one in session.vectors.definitions(part.rows)))
    found: set[int | None] = set()
    for source, places in session.resolve(part.store, part.rows):
        collections = session.source_of(source.space).store.manifest.collections
        starts = np.array([one.first_row for one in collections])
        numbers = np.unique(np.searchsorted(starts, part.rows[places], side="right") - 1)
        found |= {collections[number].checkpoint for number in numbers.tolist()}
    return found
