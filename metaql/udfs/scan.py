"""``metaql_scan(store, first, rows, g) -> DOUBLE[]``: one vector's products with all rows of a stretch of a store.

What compiled SQL calls where most rows of a split are wanted: DuckDB then looks the scores up in a list, and calls no
function for each 2,048 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from metaql.storage.arrow_arrays import primitive, truths
from metaql.udfs import column, references
from metaql.udfs.function import Function, one, one_thread
from metaql.udfs.references import GRADIENT, Floats, References
from metaql.udfs.rows import Rows
from metaql.udfs.session import Session

SCAN = "metaql_scan"


def scan(session: Session) -> Function:
    """The scores of ``rows`` rows of a store from row ``first`` on; NULL where the gradient is NULL."""

    def evaluate(store: Any, first: Any, rows: Any, gradient: Any) -> pa.Array:
        stores, begins, counts = (references.array(values).to_pylist() for values in (store, first, rows))
        vectors, mask = one(gradient)
        there = list(range(len(vectors))) if mask is None else np.flatnonzero(mask).tolist()
        lengths = np.zeros(len(stores), dtype=np.int32)
        found: list[Floats] = []
        with one_thread():
            for number, place in enumerate(there):
                vector = vectors.at(slice(number, number + 1))
                found.append(_scores(session, stores[place], begins[place], counts[place], vector))
                lengths[place] = counts[place]
        values = np.concatenate(found) if found else np.zeros(0)
        offsets = primitive(np.concatenate([[0], lengths.cumsum()]).astype(np.int32), pa.int32())
        missing = None if mask is None else truths(~mask)
        return pa.ListArray.from_arrays(offsets, references.scatter(values, None), mask=missing)

    return Function(SCAN, ("BIGINT", "BIGINT", "BIGINT", GRADIENT), "DOUBLE[]", evaluate)


def _scores(session: Session, store: int, first: int, count: int, vector: References) -> Floats:
    ((other_store, pattern, _),) = vector.groups()
    numbers = np.arange(first, first + count)
    ((source, _),) = session.resolve(store, numbers[:1])
    ((other, _),) = session.resolve(other_store, vector.row)
    terms = source.space.shared("", other.space, pattern)
    return column.scores(session, terms, Rows(source, numbers, consecutive=True), Rows(other, vector.row), count)
