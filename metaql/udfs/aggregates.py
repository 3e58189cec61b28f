"""What ``avg(g)`` and ``sum(g)`` compile to: functions over the list of a group's gradients and weights.

DuckDB has no aggregate functions in Python; a list aggregate is built in. These names are for compiled SQL: in
text that no planner sees, ``avg(g)`` is DuckDB's own binder error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from metaql.errors import QueryError
from metaql.storage.arrow_arrays import as_numpy, column, truths
from metaql.udfs import references
from metaql.udfs.definitions import combine
from metaql.udfs.function import Function, conjunction, one_thread
from metaql.udfs.references import GRADIENT
from metaql.udfs.session import Session

MEAN = "metaql_mean"
SUM = "metaql_sum"
WEIGHTED = f"STRUCT(gradient {GRADIENT}, weight DOUBLE)"


def mean(session: Session) -> Function:
    """Σ weight·gradient / n over the n entries where both are there; NULL when there is none."""
    return _aggregate(session, MEAN, average=True)


def total(session: Session) -> Function:
    """Σ weight·gradient over the entries where both are there; NULL when there is none."""
    return _aggregate(session, SUM, average=False)


def _aggregate(session: Session, name: str, average: bool) -> Function:
    def evaluate(groups: Any) -> pa.Array:
        groups = references.array(groups)
        numbers = np.zeros(len(groups), dtype=np.int64)
        mask = np.zeros(len(groups), dtype=np.bool_)
        with one_thread():
            for place in range(len(groups)):
                number = _combined(session, groups, place, average)
                if number is not None:
                    numbers[place], mask[place] = number, True
        count = int(mask.sum())
        stores = np.full(count, session.id, dtype=np.int64)
        return references.write(stores, numbers[mask], column([""] * count, pa.string()), mask)

    return Function(name, (f"{WEIGHTED}[]",), GRADIENT, evaluate)


def _combined(session: Session, groups: pa.ListArray, place: int, average: bool) -> int | None:
    """The number of a group's vector; None for a group without gradients."""
    if not groups[place].is_valid:
        return None
    begin, end = groups.offsets[place].as_py(), groups.offsets[place + 1].as_py()
    entries = groups.values.slice(begin, end - begin)
    gradients, weights = entries.flatten()
    children, there = references.parts(gradients)
    present = as_numpy(weights.is_valid()) if weights.null_count else None
    mask = conjunction(there, present)
    if mask is not None:
        weights = weights.filter(truths(mask))
    if len(weights) == 0:
        return None
    values = as_numpy(weights)
    if np.isinf(values).any():
        raise QueryError("a weight in an average or a sum of gradients is infinite: leave such rows out (isfinite)")
    found = references.read(children, mask)
    return session.vectors.add(combine(session, found, values / len(values) if average else values))
