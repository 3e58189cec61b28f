"""``norm(g) -> DOUBLE``: the Euclidean length √⟨g, g⟩."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from metaql.udfs.function import Function, one, one_thread, scores
from metaql.udfs.references import GRADIENT
from metaql.udfs.scoring import squared_norms
from metaql.udfs.session import Session


def norm(session: Session) -> Function:
    """NULL where the gradient is NULL."""

    def evaluate(gradient: Any) -> pa.Array:
        gradient, mask = one(gradient)
        with one_thread():
            # Rounding may leave a square a hair below zero.
            return scores(np.sqrt(np.maximum(squared_norms(session, gradient), 0)), mask)

    return Function("norm", (GRADIENT,), "DOUBLE", evaluate)
