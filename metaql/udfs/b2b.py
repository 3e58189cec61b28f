"""``b2b(train, query, layers, checkpoint)``: how much the average training sample helps the average query sample."""

from __future__ import annotations

from metaql.udfs.operators import both_sides, operator

B2B = operator(
    "b2b",
    ("influence",),
    "SELECT avg(inner_product(train.gradient, {query_gradient})) AS influence FROM {train} AS train, {query} AS query",
    both_sides,
)
