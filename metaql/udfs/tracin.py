"""``tracin(train, query, layers, checkpoint)``: TracIn (Pruthi et al., 2020) over checkpoints."""

from __future__ import annotations

from metaql.errors import QueryError
from metaql.udfs.operators import operator
from metaql.udfs.table_functions import Asked
from metaql.udfs.trajectories import checkpoints_of, schema


def _sides(asked: Asked) -> dict[str, str]:
    found = {side: checkpoints_of(asked, side) for side in ("train", "query")}
    _require_rates(asked)
    maximizes = any("maximize" in each.settings for each in asked.source.store.manifest.checkpoints)
    sign = "CASE WHEN checkpoints.maximize THEN -1 ELSE 1 END * " if maximizes else ""
    return {**found, "checkpoints": f"{schema(asked)}.checkpoints", "rate": f"{sign}checkpoints.learning_rate"}


def _require_rates(asked: Asked) -> None:
    manifest = asked.source.store.manifest
    at: dict[str, set[int]] = {}
    for each in manifest.collections:
        if each.checkpoint is not None and asked.call.checkpoint in (None, each.checkpoint):
            at.setdefault(each.split.lower(), set()).add(each.checkpoint)
    splits = [str(text).lower() for text in (asked.call.train, asked.call.query)]
    common = at.get(splits[0], set()) & at.get(splits[1], set())
    rates = {each.number: each.settings.get("learning_rate") for each in manifest.checkpoints}
    unknown = sorted(number for number in common if type(rates.get(number)) not in (int, float))
    if not common:
        raise QueryError(
            f"tracin(…): {asked.call.train} and {asked.call.query} have no checkpoint in common at which both were "
            "collected"
        )
    if unknown:
        raise QueryError(
            f"tracin(…): the learning rate at checkpoint {', '.join(map(str, unknown))} is not one known number. Save "
            "it with recorder.checkpoint(optimizer) or recorder.checkpoint(learning_rate=…), or write the sum over "
            "gradients and checkpoints with weights of your own (docs/methods.md)"
        )


TRACIN = operator(
    "tracin",
    ("sample_id", "influence"),
    "SELECT train.sample_id, sum({rate} * inner_product(train.gradient, query.mean)) AS influence"
    " FROM {train} AS train JOIN (SELECT query.checkpoint, avg({query_gradient}) AS mean FROM {query} AS query"
    " GROUP BY query.checkpoint) AS query USING (checkpoint)"
    " JOIN {checkpoints} AS checkpoints USING (checkpoint) GROUP BY train.sample_id",
    _sides,
)
