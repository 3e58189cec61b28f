"""``b2b(train, query, layers, checkpoint)``: how much the average training sample helps the average query sample."""

from __future__ import annotations

from metaql.udfs.operators import Operator, both_sides

B2B = Operator(
    "b2b",
    ("influence",),
    "SELECT avg(inner_product(train.gradient, {query_gradient})) AS influence FROM {train} AS train, {query} AS query",
    both_sides,
)
