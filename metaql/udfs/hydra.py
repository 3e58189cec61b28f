"""``hydra(train, query, layers, checkpoint)``: what each training sample's steps did to the query samples' loss."""

from __future__ import annotations

from metaql.udfs.hydra_weights import HYDRA_WEIGHTS
from metaql.udfs.operators import operator
from metaql.udfs.quoting import literal
from metaql.udfs.table_functions import Asked
from metaql.udfs.trajectories import query_in_group, query_side, schema, steps_of


def _sides(asked: Asked) -> dict[str, str]:
    query, checkpoint = query_side(asked)
    weights = (
        f"(SELECT unnest({HYDRA_WEIGHTS}({literal(asked.source.name)}, checkpoint), recursive := true)"
        f" FROM {schema(asked)}.checkpoints WHERE checkpoint = {checkpoint})"
    )
    return {
        "train": steps_of(asked, "train"),
        "query": query,
        "weights": weights,
        "mean": query_in_group(asked, "query.mean", "weights.parameters"),
    }


HYDRA = operator(
    "hydra",
    ("sample_id", "influence"),
    "SELECT train.sample_id, sum(weights.weight * inner_product(train.gradient, {mean})) AS influence"
    " FROM {train} AS train JOIN {weights} AS weights USING (step),"
    " (SELECT avg({query_gradient}) AS mean FROM {query} AS query) AS query GROUP BY train.sample_id",
    _sides,
)
