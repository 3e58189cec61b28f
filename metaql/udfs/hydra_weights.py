"""``metaql_hydra_weights(schema, checkpoint)``: HYDRA's weight of every recorded step, behind ``hydra_weights``.

DuckDB has no table functions in Python: this returns the rows as a list.
"""

from __future__ import annotations

import glob
from typing import Any

import numpy as np
import pyarrow as pa

from metaql.errors import QueryError
from metaql.methods.hydra import Pass, require_updates, step_weights
from metaql.storage import tables
from metaql.storage.arrow_arrays import column, primitive
from metaql.storage.store import Store
from metaql.udfs import references
from metaql.udfs.function import Function
from metaql.udfs.patterns import OR
from metaql.udfs.session import Session

HYDRA_WEIGHTS = "metaql_hydra_weights"
COLUMNS = {"step": pa.int64(), "parameter_group": pa.int64(), "parameters": pa.string(), "weight": pa.float64()}
_RETURNS = "STRUCT(step BIGINT, parameter_group BIGINT, parameters VARCHAR, weight DOUBLE)[]"


def hydra_weights(session: Session) -> Function:
    """A list for each pair of a schema and a checkpoint's number; empty where the checkpoint is NULL."""

    def evaluate(schemas: Any, checkpoints: Any) -> pa.Array:
        asked = zip(*(references.array(each).to_pylist() for each in (schemas, checkpoints)), strict=True)
        lists = [None if number is None else _rows(session.source(name).store, number) for name, number in asked]
        offsets = np.cumsum([0, *(len(each or ()) for each in lists)]).astype(np.int32)
        rows = [row for each in lists for row in each or ()]
        columns = zip(*rows, strict=True) if rows else [()] * len(COLUMNS)
        values = [column(each, kind) for each, kind in zip(columns, COLUMNS.values(), strict=True)]
        structs = pa.StructArray.from_arrays(values, names=list(COLUMNS))
        return pa.ListArray.from_arrays(primitive(offsets, pa.int32()), structs)

    return Function(HYDRA_WEIGHTS, ("VARCHAR", "BIGINT"), _RETURNS, evaluate)


def group_patterns(store: Store) -> list[str | None]:
    """For each parameter group the pattern that selects its recorded parameters; None where it has none.

    QueryError where the groups are not known, or changed while training.
    """
    groups = tables.parameter_groups(store)
    if groups is None:
        raise QueryError(
            "the optimizer's parameter groups changed between the recorded steps, or two optimizers took turns: which "
            "settings a parameter was updated with is not known. Record runs with other groups into stores of their own"
        )
    recorded = {parameter.name for layer in store.layers for parameter in layer.parameters}
    return [_pattern(group, recorded) for group in groups]


def _pattern(group: list[str], recorded: set[str]) -> str | None:
    own = [name for name in group if name in recorded]
    if not own:
        return None
    return "*" if len(own) == len(recorded) else OR.join(glob.escape(name) for name in own)


def _rows(store: Store, checkpoint: int) -> list[tuple[Any, ...]]:
    """The values of ``COLUMNS`` for each recorded step and parameter group."""
    by_group = passes(store)
    if not by_group:
        return []
    updates, patterns = updates_at(store, checkpoint), group_patterns(store)
    require_updates(each for own in by_group.values() for each in own)
    rows: list[tuple[Any, ...]] = []
    for group, own in by_group.items():
        pattern = patterns[group]
        if pattern is not None:
            weights = step_weights(own, updates)
            rows += [
                (one.step, group, pattern, weight)
                for one, weight in zip(own, weights, strict=True)
                if one.step is not None
            ]
    return rows


def passes(store: Store) -> dict[int, list[Pass]]:
    """The recorded passes and updates of each parameter group."""
    table = tables.steps(store)
    columns = {name: table.column(name).to_pylist() for name in Pass.__dataclass_fields__}
    found: dict[int, list[Pass]] = {}
    for group, *values in zip(table.column("parameter_group").to_pylist(), *columns.values(), strict=True):
        found.setdefault(group, []).append(Pass(*values))
    return dict(sorted(found.items()))


def updates_at(store: Store, checkpoint: int) -> int:
    """How many updates led to the weights of a checkpoint. QueryError where that is not known."""
    found = next((each for each in store.manifest.checkpoints if each.number == checkpoint), None)
    updates = None if found is None else found.settings.get("updates")
    if not isinstance(updates, int):
        raise QueryError(
            f"checkpoint {checkpoint} was not saved by a recorder that had recorded steps before, so it is not known "
            "which of them led to its weights. Call recorder.checkpoint(optimizer) after the steps, and collect the "
            "query samples there"
        )
    return updates
