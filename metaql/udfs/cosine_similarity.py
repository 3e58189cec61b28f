"""``cosine_similarity(g, h) -> DOUBLE``: ⟨g, h⟩ / (‖g‖·‖h‖), from -1 to 1."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from metaql.storage.arrow_arrays import primitive
from metaql.udfs.function import Function, both, one_thread
from metaql.udfs.references import GRADIENT
from metaql.udfs.scoring import inner_products, squared_norms
from metaql.udfs.session import Session


def cosine_similarity(session: Session) -> Function:
    """NULL where either gradient is NULL, and where one is zero: it has no direction.

    Over layers that differ (``cosine_similarity(layers(g, 'fc1'), h)``) each gradient has its own norm, over its
    own layers.
    """

    def evaluate(left: Any, right: Any) -> pa.Array:
        left, right, mask = both(left, right)
        with one_thread():
            products = inner_products(session, left, right)
            lengths = np.sqrt(np.maximum(squared_norms(session, left) * squared_norms(session, right), 0))
        known = lengths > 0
        cosines = np.clip(np.divide(products, lengths, where=known, out=np.zeros_like(products)), -1, 1)
        result = np.zeros(known.size if mask is None else mask.size)
        there = np.zeros(result.size, dtype=np.bool_)
        places = slice(None) if mask is None else mask
        result[places], there[places] = cosines, known
        return primitive(result, pa.float64(), there)

    return Function("cosine_similarity", (GRADIENT, GRADIENT), "DOUBLE", evaluate)
