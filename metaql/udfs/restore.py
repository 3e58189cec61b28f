"""``restore(g, pattern) -> FLOAT[]``: the numbers themselves, of the parameters that a pattern selects.

DOUBLE[] in a DuckDB instance that has loaded a float64 store.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from metaql.udfs.function import Function, one_thread
from metaql.udfs.kernels import restored
from metaql.udfs.layers import restricted
from metaql.udfs.references import GRADIENT, References
from metaql.udfs.session import Session
from metaql.udfs.slices import columns


def restore(session: Session) -> Function:
    """The selected parameters in the model's order, each flattened row by row.

    NULL where the gradient or the pattern is NULL; empty where a pattern and an earlier ``layers`` exclude
    each other.
    """
    double = any(layer.dtype == "float64" for store in session.stores for layer in store.layers)
    dtype = np.float64 if double else np.float32

    def evaluate(gradient: Any, pattern: Any) -> pa.Array:
        found, _, mask = restricted(session, gradient, pattern)
        with one_thread():
            vectors = _vectors(session, found)
        present = list(range(len(found))) if mask is None else np.flatnonzero(mask).tolist()
        result: list[Any] = [None] * (len(found) if mask is None else len(mask))
        for place, vector in zip(present, vectors, strict=True):
            result[place] = vector
        return _lists(result, dtype)

    return Function("restore", (GRADIENT, "VARCHAR"), "DOUBLE[]" if double else "FLOAT[]", evaluate)


def _vectors(session: Session, found: References) -> list[Any]:
    result: list[Any] = [None] * len(found)
    for store, pattern, places in found.groups():
        numbers, where = found.row[places], np.arange(len(found))[places]
        for source, inner in session.resolve(store, numbers):
            parts = []
            for chosen in source.space.select(pattern):
                whole = restored(chosen.layer, source.read(chosen.layer, numbers[inner]))
                parts.append(columns(chosen.layer, chosen.places, whole))
            rows = torch.cat(parts, dim=1).cpu().numpy() if parts else np.zeros((len(numbers[inner]), 0))
            for place, row in zip(where[inner], rows, strict=True):
                result[place] = row
    return result


def _lists(vectors: list[Any], dtype: Any) -> pa.Array:
    lengths = np.array([0 if vector is None else len(vector) for vector in vectors], dtype=np.int64)
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), lengths.cumsum()])
    present = [vector for vector in vectors if vector is not None]
    values = np.concatenate(present).astype(dtype) if present else np.zeros(0, dtype=dtype)
    missing = pa.array([vector is None for vector in vectors], type=pa.bool_())
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values), mask=missing)
