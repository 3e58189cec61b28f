"""``inner_product(g, h) -> DOUBLE``: ⟨g, h⟩ over the parameters that both have."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from metaql.udfs.function import Function, both, one_thread, scores
from metaql.udfs.references import GRADIENT
from metaql.udfs.scoring import inner_products
from metaql.udfs.session import Session


def inner_product(session: Session) -> Function:
    """NULL where either gradient is NULL."""

    def evaluate(left: Any, right: Any) -> pa.Array:
        left, right, mask = both(left, right)
        with one_thread():
            return scores(inner_products(session, left, right), mask)

    return Function("inner_product", (GRADIENT, GRADIENT), "DOUBLE", evaluate)
