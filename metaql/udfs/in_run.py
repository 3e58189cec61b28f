"""``in_run(train, query, layers)``: first-order in-run data values (Wang et al., 2024) along the recorded steps."""

from __future__ import annotations

from metaql.errors import QueryError
from metaql.methods.hydra import require_factors
from metaql.udfs.hydra_weights import group_patterns, passes
from metaql.udfs.operators import operator
from metaql.udfs.quoting import literal
from metaql.udfs.table_functions import Asked
from metaql.udfs.trajectories import query_in_group, schema, steps_of


def _sides(asked: Asked) -> dict[str, str]:
    if asked.call.checkpoint is not None:
        raise QueryError(
            "in_run(checkpoint := …): its query side are the steps at which the query samples were recorded"
        )
    for own in passes(asked.source.store).values():
        require_factors([each for each in own if each.update is not None])
    return {
        "train": steps_of(asked, "train"),
        "query": steps_of(asked, "query"),
        "steps": f"{schema(asked)}.steps",
        "mean": query_in_group(asked, "query.mean", _patterns(asked)),
    }


def _patterns(asked: Asked) -> str:
    """The pattern of a row's parameter group, as SQL."""
    patterns = group_patterns(asked.source.store)
    listed = ", ".join("NULL" if each is None else literal(each) for each in patterns)
    return f"([{listed}]::VARCHAR[])[steps.parameter_group + 1]"


IN_RUN = operator(
    "in_run",
    ("sample_id", "influence"),
    "SELECT train.sample_id, sum(CASE WHEN steps.maximize THEN -1 ELSE 1 END * steps.learning_rate"
    " * steps.sample_factor * steps.gradient_factor * inner_product(train.gradient, {mean})) AS influence"
    " FROM {train} AS train JOIN {steps} AS steps USING (step)"
    " JOIN (SELECT steps.updates, avg({query_gradient}) AS mean FROM {query} AS query"
    " JOIN (SELECT DISTINCT step, updates FROM {steps}) AS steps USING (step) GROUP BY steps.updates) AS query"
    " ON query.updates = steps.updates"
    " WHERE steps.update IS NOT NULL GROUP BY train.sample_id",
    _sides,
)
