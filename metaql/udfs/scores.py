"""``metaql_scores(measure, g, members) -> DOUBLE[]``: a gradient's scores with every member of a list.

What compiled SQL calls for all pairs of two relations: the rows of one a chunk at a time, those of the other in
lists of some hundreds (``members.py``). Each call is a product of matrices; DuckDB unnests it without Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from metaql.storage.arrow_arrays import primitive
from metaql.udfs.crossed import tiles
from metaql.udfs.function import Function, one_thread
from metaql.udfs.references import GRADIENT, array, scatter
from metaql.udfs.session import Session

SCORES = "metaql_scores"


def scores(session: Session) -> Function:
    """As long as the list, with NULL where either gradient is NULL; NULL where there is no list."""

    def evaluate(measure: Any, gradients: Any, lists: Any) -> pa.Array:
        with one_thread():
            found = tiles(session, measure, gradients, lists)
        lengths = np.zeros(len(gradients), dtype=np.int64)
        for tile in found:
            lengths[tile.rows] = tile.scores.shape[1]
        offsets = np.concatenate([[0], lengths.cumsum()])
        values, known = np.zeros(offsets[-1]), np.ones(offsets[-1], dtype=np.bool_)
        for tile in found:
            if tile.scores.size == len(values):
                values = tile.scores.reshape(-1)
                known = known if tile.known is None else tile.known.reshape(-1)
                continue
            places = offsets[tile.rows][:, None] + np.arange(tile.scores.shape[1])
            values[places], known[places] = tile.scores, True if tile.known is None else tile.known
        return as_lists(offsets, scatter(values[known], known) if not known.all() else scatter(values, None), lists)

    return Function(SCORES, ("VARCHAR", GRADIENT, "BIGINT"), "DOUBLE[]", evaluate)


def as_lists(offsets: Any, values: pa.Array, beside: Any) -> pa.ListArray:
    """A column of lists, NULL where the column beside it is."""
    missing = None if not beside.null_count else array(beside).is_null()
    return pa.ListArray.from_arrays(primitive(offsets.astype(np.int32), pa.int32()), values, mask=missing)
