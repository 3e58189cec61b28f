"""``p2p(train, query, layers, checkpoint)``: how much each training sample helps each query sample."""

from __future__ import annotations

from metaql.udfs.operators import both_sides, operator

P2P = operator(
    "p2p",
    ("sample_id", "query_id", "influence"),
    "SELECT train.sample_id, query.sample_id AS query_id,"
    " inner_product(train.gradient, {query_gradient}) AS influence FROM {train} AS train, {query} AS query",
    both_sides,
)
