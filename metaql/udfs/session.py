"""What one DuckDB instance has loaded: the stores by id, the models for replay, and vectors made by queries.

The functions registered in the instance hold its session, so a session lives exactly as long as they do.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch

from metaql.errors import QueryError, ReferenceError
from metaql.storage.store import Store
from metaql.udfs.costs import SHIPPED, Constants
from metaql.udfs.counters import Counters
from metaql.udfs.curvatures import Curvatures
from metaql.udfs.fits import Fits
from metaql.udfs.kept_scores import KeptScores
from metaql.udfs.members import MemberLists
from metaql.udfs.models import Model
from metaql.udfs.patterns import Space
from metaql.udfs.references import Ints
from metaql.udfs.sources import Source, StoreSource
from metaql.udfs.vectors import Vectors
from metaql.udfs.work import Work

_sessions: WeakValueDictionary[int, Session] = WeakValueDictionary()


class Session:
    """The stores, models and vectors that an instance's functions look references up in."""

    def __init__(self) -> None:
        self.id = secrets.randbits(62) + 1
        self.vectors = Vectors(self)
        self.kept_scores = KeptScores()
        self.counters = Counters()
        # Asked when the first choice has to be made; whoever opens the session may know the machine better.
        self.measure: Callable[[], Constants] = lambda: SHIPPED
        self.members = MemberLists()
        self.curvatures = Curvatures()
        self.work = Work()
        self.fits = Fits()
        # Of whoever opens the session; DuckDB's own threads would train with another number, and other roundings.
        self.threads = torch.get_num_threads()
        # Names of the functions that hold it, and of the macro in front of one, in lower case.
        self.functions: frozenset[str] = frozenset()
        self._stores: dict[int, list[StoreSource]] = {}
        self._named: dict[str, StoreSource] = {}
        self._models: dict[str, Model] = {}
        # Plans a text that stands for something of a store, under a search path, while DuckDB binds a query; the
        # front end gives it.
        self.plan: Callable[[str, StoreSource, str], str] | None = None
        # The type that restore(…) is registered with; None before it is.
        self.restored_as: str | None = None
        _sessions[self.id] = self

    def add(self, source: StoreSource) -> None:
        """Loads a snapshot of a store; of several of one store the newest is asked first."""
        snapshots = self._stores.setdefault(source.store.id, [])
        snapshots.append(source)
        snapshots.sort(key=lambda one: -one.store.version)
        self._named[source.name] = source

    def source(self, name: str) -> StoreSource:
        """The snapshot that was loaded last under a name."""
        return self._named[name]

    def source_of(self, space: Space) -> StoreSource:
        """The snapshot whose gradients are vectors over this space."""
        sources = (source for snapshots in self._stores.values() for source in snapshots)
        return next(source for source in sources if source.space is space)

    def add_model(self, model: Model) -> None:
        """Loads a model that can replay a store's samples."""
        self._models[model.source.name] = model

    @cached_property
    def costs(self) -> Constants:
        """What things cost on the machine, or the device, that scores are computed on."""
        return self.measure()

    @property
    def stores(self) -> tuple[Store, ...]:
        """The loaded stores, the newest snapshot of each first."""
        return tuple(source.store for snapshots in self._stores.values() for source in snapshots)

    def model(self, name: str | None = None) -> Model:
        """The model of this name; by default the one there is, for ``gradient(input, target)``."""
        if name is not None:
            if name not in self._models:
                raise QueryError(
                    f"this runs the model that {name} was recorded from, and there is none: pass it as model= to"
                    " metaql.connect or metaql.load"
                )
            return self._models[name]
        if not self._models:
            raise QueryError(
                "gradient(input, target) runs the model, and there is none: pass it as model= to metaql.connect"
                " or metaql.load"
            )
        if len(self._models) > 1:
            raise QueryError(
                "gradient(input, target) can't tell which model is meant: there is one for each of"
                f" {', '.join(self._models)}. Pass model= for one of them only"
            )
        return next(iter(self._models.values()))

    def resolve(self, store: int, row_numbers: Ints) -> Iterator[tuple[Source, Any]]:
        """(source, places) of the references to these rows of a store; usually one source for all places."""
        if store == self.id:
            yield from self.vectors.resolve(row_numbers)
            return
        snapshots = self._stores.get(store, [])
        for source in snapshots:
            if len(snapshots) == 1 or source.store.has_rows(row_numbers):
                yield source, slice(None)
                return
        if not snapshots:
            raise ReferenceError(self._unknown_store(store))
        yield from _each_row(snapshots, row_numbers)

    def _unknown_store(self, store: int) -> str:
        loaded = ", ".join(f"{source.name} ({source.store.id})" for s in self._stores.values() for source in s)
        return (
            f"a gradient reference belongs to store {store}, which is not loaded on this connection"
            f" (loaded: {loaded or 'none'}). References made by avg, sum or gradient(…) live only as long as the"
            " connection that made them"
        )


def _each_row(snapshots: list[StoreSource], row_numbers: Ints) -> Iterator[tuple[Source, Any]]:
    """The rows spread over snapshots; those in none go to the newest, whose error names them."""
    owner = np.zeros(len(row_numbers), dtype=np.int64)
    for place, row in enumerate(row_numbers):
        one = np.array([row])
        owner[place] = next((k for k, source in enumerate(snapshots) if source.store.has_rows(one)), 0)
    for number in np.unique(owner):
        yield snapshots[number], np.flatnonzero(owner == number)


def find(identity: int) -> Session | None:
    """The session with this id, if its DuckDB instance is still open."""
    return _sessions.get(identity)
