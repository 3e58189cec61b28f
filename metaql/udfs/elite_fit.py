"""``metaql_elite_fit(schema, settings, id_type, rows, labelled)``: trains, saves, and returns a result for each row.

DuckDB has no table functions in Python: rows come as a list of structs, and go as one.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from decimal import Decimal
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from metaql.errors import QueryError
from metaql.methods.elite import Fitted, Progress, Settings, fit
from metaql.methods.elite.detectors import find_detector
from metaql.methods.elite.networks import NETWORKS
from metaql.storage import saved_models
from metaql.storage.arrow_arrays import primitive, truths
from metaql.udfs import references
from metaql.udfs.feature_rows import FeatureRows, GivenRows, feature_rows, in_order_of, require_finite
from metaql.udfs.function import Function, torch_threads
from metaql.udfs.labelled_rows import given_rows, labels
from metaql.udfs.references import Bools
from metaql.udfs.session import Session

KIND = "elite"
FIT = "metaql_elite_fit"
SETTINGS = tuple(each.name for each in fields(Settings))
RESULTS = {
    "anomaly_score": pa.float32(),
    "pseudo_label": pa.bool_(),
    "meta_gradient": pa.float32(),
    "weight": pa.float32(),
}
COLUMNS = ("sample_id", *RESULTS)
_RETURNS = "STRUCT(anomaly_score FLOAT, pseudo_label BOOLEAN, meta_gradient FLOAT, weight FLOAT)[]"


def elite_fit(session: Session) -> Function:
    """A list of ``RESULTS`` in the rows' order; NULL for rows with a NULL among their features."""

    def evaluate(schemas: Any, settings: Any, id_types: Any, rows: Any, labelled: Any) -> pa.Array:
        columns = [references.array(each) for each in (schemas, settings, id_types, rows, labelled)]
        return pa.concat_arrays([_evaluated(*(each[place] for each in columns)) for place in range(len(columns[0]))])

    def _evaluated(schema: Any, settings: Any, id_type: Any, rows: Any, labelled: Any) -> Any:
        store = session.source(schema.as_py()).store.path
        given = settings.as_py()
        training = Training(settings_of(given), rows, labelled)
        folder = require_savable(store, given["save_as"])
        fitted = session.fits.trained(training.key, lambda: _trained(session, training))
        if folder is not None:
            training.save(folder, fitted, id_type.as_py())
        return _results(fitted, training.data)

    return Function(FIT, None, _RETURNS, evaluate)


def settings_of(given: dict[str, Any]) -> Settings:
    """The settings among a call's arguments; NULL is the default. QueryError for values that make no sense."""
    values = {name: given[name] for name in SETTINGS if given[name] is not None}
    values = {name: float(value) if isinstance(value, Decimal) else value for name, value in values.items()}
    try:
        settings = Settings(**values)
        find_detector(settings)
        if settings.network is not None:
            NETWORKS.find(settings.network)
    except QueryError as error:
        raise QueryError(f"elite(…): {error}") from None
    return settings


def require_savable(store: Path, save_as: Any) -> Path | None:
    """The folder to save a model in, if it is to be saved; raises what can be known before training."""
    if save_as is None:
        return None
    if not isinstance(save_as, str):
        raise QueryError(f"elite(save_as := {save_as}): give a name in quotes, as in 'sensors_v1'")
    folder = saved_models.place_of((store,), save_as)
    saved_models.require_place(folder, KIND)
    return folder


class Training:
    """What is trained on: rows in SQL's order, and labelled ones with the same columns."""

    def __init__(self, settings: Settings, rows: Any, labelled: Any) -> None:
        self.settings = settings
        if not rows.is_valid:
            raise QueryError("elite(data): there are no rows to look at")
        self.given = given_rows("elite(data)", rows.values)
        self.data = feature_rows(self.given)
        require_finite(self.given, self.data)
        if len(self.data.values) < 2:
            raise QueryError(
                "elite(data): training needs 2 rows or more without a NULL among their features, and of"
                f" {len(self.given)} there {'is one' if len(self.data.values) else 'is none'}"
            )
        self.labelled_ids: Any = None
        self.labelled: Tensor | None = None
        self.is_anomaly: Tensor | None = None
        if labelled.is_valid:
            self._take_labels(labelled.values)

    def _take_labels(self, structs: Any) -> None:
        given = in_order_of(self.given.columns, given_rows("elite(labelled)", structs), "elite(data)")
        is_anomaly, there = labels(given, structs)
        found = feature_rows(given)
        require_finite(given, found)
        chosen = there[found.places]
        rows = found.values[torch.from_numpy(chosen)]
        if not len(rows):
            return
        places = found.places[chosen]
        self._require_labels(given, rows, is_anomaly[places])
        self.labelled, self.is_anomaly = rows, torch.from_numpy(is_anomaly[places])
        self.labelled_ids = None if given.ids is None else given.ids.take(primitive(places, pa.int64()))

    def _require_labels(self, given: GivenRows, rows: Tensor, is_anomaly: Bools) -> None:
        shapes = [list(each.shape[1:]) for each in (rows, self.data.values)]
        if shapes[0] != shapes[1]:
            told = [str(shape[0]) if len(shape) == 1 else "x".join(map(str, shape)) for shape in shapes]
            raise QueryError(
                f"{given.where}: features of these rows: {told[0]}; of those of elite(data): {told[1]}. Both must be"
                " made in the same way"
            )
        if is_anomaly.all() or not is_anomaly.any():
            have, lack = (
                ("anomalies", "normal: is_anomaly = FALSE")
                if is_anomaly.all()
                else (
                    "normal",
                    "an anomaly: is_anomaly = TRUE",
                )
            )
            raise QueryError(
                f"{given.where}: all {len(is_anomaly)} rows with a label are {have}, and they are told apart by both:"
                f" label at least one row that is {lack}, or leave labelled out"
            )

    @property
    def key(self) -> tuple[object, ...]:
        """The same for what would train the same model; others may have been registered under the same names."""
        network = self.settings.network
        return self._digest(), find_detector(self.settings), None if network is None else NETWORKS.find(network)

    def save(self, folder: Path, fitted: Fitted, id_type: str) -> None:
        """Keeps the model, with the rows it was trained on, unless it is there already."""
        digest = self._digest(self.given.ids, self.labelled_ids)
        if saved_models.is_there(folder, digest):
            return
        tensors, description = fitted.saved()
        told = {
            **description,
            "digest": digest,
            "sample_id_type": id_type,
            "columns": list(self.given.columns),
        }
        tables = {"rows": self._rows(fitted), "labelled": self._labelled(fitted)}
        saved_models.save(folder, KIND, tensors, told, tables)

    def _rows(self, fitted: Fitted) -> pa.Table:
        ids = self.given.ids.take(primitive(self.data.places, pa.int64()))
        known = np.zeros(len(ids), dtype=np.bool_)
        if self.labelled_ids is not None:
            # Ids may be structs or lists, which Python can't look up; NULL is nobody's.
            values = {str(value) for value in self.labelled_ids.to_pylist()} - {str(None)}
            known = np.array([str(value) in values for value in ids.to_pylist()], dtype=np.bool_)
        columns = {name: _column(getattr(fitted, name), kind, len(ids)) for name, kind in RESULTS.items()}
        embedding = _lists(fitted.embedding(self.data.values))
        return pa.table({"sample_id": ids, **columns, "is_labelled": truths(known), "embedding": embedding})

    def _labelled(self, fitted: Fitted) -> pa.Table:
        if self.labelled is None or self.is_anomaly is None:
            return pa.table({"is_anomaly": pa.nulls(0, pa.bool_()), "embedding": pa.nulls(0, pa.list_(pa.float32()))})
        embedding = _lists(fitted.embedding(self.labelled))
        return pa.table({"is_anomaly": truths(self.is_anomaly.numpy()), "embedding": embedding})

    def _digest(self, *ids: Any) -> str:
        found = blake2b(json.dumps(asdict(self.settings)).encode(), digest_size=16)
        for tensor in (self.data.values, self.labelled, self.is_anomaly):
            if tensor is not None:
                found.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
                found.update(tensor.contiguous().numpy().data)
        for each in ids:
            found.update(str(None if each is None else each.to_pylist()).encode())
        return found.hexdigest()


def _trained(session: Session, training: Training) -> Fitted:
    with session.work.training() as told, torch_threads(session.threads):

        def progress(at: Progress) -> None:
            done = ((at.epoch - 1) * at.batches + at.batch) / (at.epochs * at.batches)
            told.reached(done, at.validation_loss)

        return fit(training.data.values, training.labelled, training.is_anomaly, training.settings, progress)


def _results(fitted: Fitted, rows: FeatureRows) -> Any:
    """One list, with NULLs for the rows that were not trained on."""
    total = len(rows.values) if rows.there is None else len(rows.there)
    columns = [_column(getattr(fitted, name), kind, total, rows.there) for name, kind in RESULTS.items()]
    structs = pa.StructArray.from_arrays(columns, names=list(RESULTS))
    return pa.ListArray.from_arrays(primitive(np.array([0, total], np.int32), pa.int32()), structs)


def _column(values: Tensor | None, kind: Any, total: int, there: Bools | None = None) -> Any:
    if values is None:
        return pa.nulls(total, kind)
    numbers = values.numpy() if there is None else np.zeros(total, values.numpy().dtype)
    if there is not None:
        numbers[there] = values.numpy()
    if kind != pa.bool_():
        return primitive(np.ascontiguousarray(numbers), kind, there)
    found = truths(numbers)
    return (
        found if there is None else pa.Array.from_buffers(kind, total, [truths(there).buffers()[1], found.buffers()[1]])
    )


def _lists(values: Tensor) -> Any:
    flat = primitive(np.ascontiguousarray(values.numpy()).reshape(-1), pa.float32())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
