"""``anomaly_score(model, features…)``: the score of each row by a model that ``elite`` saved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from metaql.errors import QueryError
from metaql.storage.arrow_arrays import as_numpy, primitive, truths
from metaql.udfs import references
from metaql.udfs.feature_rows import GivenRows, feature_rows, fields_of, in_order_of
from metaql.udfs.function import Function, one_thread
from metaql.udfs.references import Bools
from metaql.udfs.session import Session
from metaql.udfs.trained_models import loaded

# How errors speak of arguments rather than of columns.
_WORDS = {"alone": "anomaly_score(model, {})", "without": ""}


def anomaly_score(session: Session) -> Function:
    """FLOAT, larger is more anomalous; NULL where there is a NULL among the features, NaN where one is not finite."""

    def evaluate(*columns: Any) -> pa.Array:
        if len(columns) < 2:
            raise QueryError("anomaly_score(model, features): give a model's name, and a list or columns of features")
        names, *features = (references.array(each) for each in columns)
        if pa.types.is_dictionary(names.type):
            # An ENUM.
            names = names.cast(names.type.value_type)
        if not (pa.types.is_string(names.type) or pa.types.is_null(names.type)):
            raise QueryError("anomaly_score(model, features): the model's name comes first, in quotes")
        scores, there = np.zeros(len(names), np.float32), np.zeros(len(names), np.bool_)
        distinct = [] if pa.types.is_null(names.type) else names.unique().to_pylist()
        for name in distinct:
            if name is None:
                continue
            chosen = None if len(distinct) == 1 else as_numpy(pc.fill_null(pc.equal(names, name), False))
            rows = features if chosen is None else [each.filter(truths(chosen)) for each in features]
            found, known = _scores(session, name, rows)
            where = slice(None) if chosen is None else chosen
            scores[where], there[where] = found, known
        return primitive(scores, pa.float32(), there)

    return Function("anomaly_score", None, "FLOAT", evaluate)


def _scores(session: Session, name: str, columns: list[Any]) -> tuple[NDArray[np.float32], Bools]:
    """The scores of all rows, and which of them there are."""
    fitted, model = loaded(session, name)
    where = f"anomaly_score('{name}', …)"
    known = model.description["columns"]
    if len(columns) == 1 and pa.types.is_struct(columns[0].type):
        given = GivenRows(where, fields_of(where, columns[0]))
        given = in_order_of(dict.fromkeys(known), given, "the model")
    else:
        given = GivenRows(where, {f"argument {place}": each for place, each in enumerate(columns, start=2)}, **_WORDS)
    rows = feature_rows(given)
    total = len(columns[0])
    scores, there = np.zeros(total, np.float32), np.zeros(total, np.bool_)
    if not len(rows.values):
        return scores, there
    _require_shape(where, tuple(rows.values.shape[1:]), fitted.shape, known)
    with one_thread():
        found = fitted.score(rows.values)
    finite = rows.values.flatten(1).isfinite().all(1)
    scores[rows.places] = torch.where(finite, found, torch.nan).numpy()
    there[rows.places] = True
    return scores, there


def _require_shape(where: str, given: tuple[int, ...], wanted: tuple[int, ...], columns: list[str]) -> None:
    if given != wanted:
        told = ["x".join(map(str, shape)) for shape in (given, wanted)]
        names = f" ({', '.join(columns)})" if len(columns) > 1 else ""
        raise QueryError(
            f"{where}: features of these rows: {told[0]}; of those that the model was trained on: {told[1]}{names}."
            " Give it the same ones in the same order"
        )
