"""``p2b(train, query, layers, checkpoint)``: how much each training sample helps the average query sample."""

from __future__ import annotations

from metaql.udfs.operators import both_sides, operator

P2B = operator(
    "p2b",
    ("sample_id", "influence"),
    "SELECT train.sample_id, avg(inner_product(train.gradient, {query_gradient})) AS influence"
    " FROM {train} AS train, {query} AS query GROUP BY train.sample_id",
    both_sides,
)
