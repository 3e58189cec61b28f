"""``elite_candidates(model, budget)``: which of the rows that a model was trained on to label next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from metaql.errors import QueryError
from metaql.methods.elite import candidates
from metaql.storage.arrow_arrays import as_numpy, primitive
from metaql.udfs import references
from metaql.udfs.function import Function
from metaql.udfs.quoting import literal
from metaql.udfs.references import Ints
from metaql.udfs.session import Session
from metaql.udfs.table_functions import Asked, TableFunction
from metaql.udfs.trained_models import find_model

CHOSEN = "metaql_elite_chosen"


@dataclass(frozen=True)
class _Call:
    model: str | None = None
    budget: int | None = 20


def _sql(asked: Asked) -> str:
    name, budget = asked.call.model, asked.call.budget
    if name is None:
        raise QueryError("elite_candidates(model): give the name that a model was saved as, as in 'sensors_v1'")
    if budget is None or budget < 1:
        told = "NULL" if budget is None else budget
        raise QueryError(f"elite_candidates(budget := {told}): give how many rows you can label, a number from 1 on")
    model = find_model((asked.source.store.path,), name)
    rows, labelled = (literal(str(model.table(each).absolute())) for each in ("rows", "labelled"))
    kind = model.description["sample_id_type"]
    return (
        f"SELECT CAST(rows.sample_id AS {kind}) AS sample_id, chosen.rank, rows.anomaly_score, rows.pseudo_label,"
        f" rows.meta_gradient FROM (SELECT unnest({CHOSEN}({rows}, {labelled}, {budget}), recursive := true)) AS chosen"
        f" JOIN read_parquet({rows}, file_row_number := true) AS rows ON rows.file_row_number = chosen.place"
        " ORDER BY chosen.rank"
    )


def elite_chosen(session: Session) -> Function:
    """``metaql_elite_chosen(rows, labelled, budget)``: places among a model's saved rows, the first to label first."""

    def evaluate(*columns: Any) -> pa.Array:
        asked = zip(*(references.array(each).to_pylist() for each in columns), strict=True)
        found = [_chosen(*one) for one in asked]
        offsets = np.cumsum([0, *map(len, found)]).astype(np.int32)
        ranks = np.concatenate([np.arange(1, len(each) + 1) for each in found])
        values = [primitive(each.astype(np.int64), pa.int64()) for each in (ranks, np.concatenate(found))]
        structs = pa.StructArray.from_arrays(values, names=["rank", "place"])
        return pa.ListArray.from_arrays(primitive(offsets, pa.int32()), structs)

    return Function(CHOSEN, ("VARCHAR", "VARCHAR", "BIGINT"), "STRUCT(rank BIGINT, place BIGINT)[]", evaluate)


def _chosen(rows: str, labelled: str, budget: int) -> Ints:
    """Places of rows that have no label yet."""
    import pyarrow.parquet as pq

    table = pq.read_table(rows, columns=["anomaly_score", "pseudo_label", "meta_gradient", "is_labelled", "embedding"])
    places = np.flatnonzero(~as_numpy(table.column("is_labelled")))
    if not len(places):
        return places
    known = pq.read_table(labelled, columns=["embedding"]).column("embedding")
    found = candidates(
        _embedding(table.column("embedding"))[places],
        torch.from_numpy(as_numpy(table.column("anomaly_score"))[places]),
        _known(table.column("pseudo_label"), places),
        _known(table.column("meta_gradient"), places),
        _embedding(known) if len(known) else None,
        budget,
    )
    chosen: Ints = places[found.numpy()]
    return chosen


def _known(column: Any, places: Ints) -> torch.Tensor | None:
    """Values of these rows; None of a model that was trained without labels."""
    return None if column.null_count else torch.from_numpy(as_numpy(column)[places])


def _embedding(column: Any) -> torch.Tensor:
    return torch.from_numpy(as_numpy(column.combine_chunks().flatten()).reshape(len(column), -1).copy())


ELITE_CANDIDATES = TableFunction(
    "elite_candidates",
    ("sample_id", "rank", "anomaly_score", "pseudo_label", "meta_gradient"),
    _Call,
    _sql,
    ("VARCHAR", "BIGINT"),
)
