"""``b2p(train, query, layers, checkpoint)``: how much the average training sample helps each query sample."""

from __future__ import annotations

from metaql.udfs.operators import both_sides, operator

B2P = operator(
    "b2p",
    ("query_id", "influence"),
    "SELECT query.sample_id AS query_id, avg(inner_product({train_gradient}, query.gradient)) AS influence"
    " FROM {train} AS train, {query} AS query GROUP BY query.sample_id",
    both_sides,
)
