"""``metaql_score(g, h, rows) -> DOUBLE``: ``inner_product(g, h)``, told by the planner how many rows to expect.

``rows`` is about how many gradients on the left each one on the right will be multiplied with over the whole query,
or NULL. It decides what is laid out, and whether blocks of rows are scored whole; it never changes an answer. The name
is for compiled SQL.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from metaql.udfs import references
from metaql.udfs.function import Function, both, one_thread, scores
from metaql.udfs.references import GRADIENT
from metaql.udfs.scoring import inner_products
from metaql.udfs.session import Session

SCORE = "metaql_score"


def score(session: Session) -> Function:
    """NULL where either gradient is NULL."""

    def evaluate(left: Any, right: Any, rows: Any) -> pa.Array:
        rows = references.array(rows)
        expected = rows[0].as_py() if len(rows) else None
        left, right, mask = both(left, right)
        with one_thread():
            return scores(inner_products(session, left, right, expected), mask)

    return Function(SCORE, (GRADIENT, GRADIENT, "DOUBLE"), "DOUBLE", evaluate)
