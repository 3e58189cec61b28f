"""Inputs and labels of recorded training samples, to run a model on them again."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from metaql.errors import QueryError
from metaql.storage import tables
from metaql.storage.arrow_arrays import as_numpy
from metaql.storage.store import Store

TRAIN = "train"


def training_samples(store: Store, checkpoint: int) -> tuple[Tensor, Tensor]:
    """Inputs [n, ...] and labels int64 [n] of the split ``train`` as it was collected at a checkpoint.

    QueryError, which says what to do, where there is no such split, or one of the two was not kept.
    """
    own = [one for one in store.manifest.collections if (one.split, one.checkpoint) == (TRAIN, checkpoint)]
    rows = np.concatenate([np.zeros(0, np.int64), *(np.arange(one.rows) + one.first_row for one in own)])
    if not len(rows):
        raise QueryError(
            f"the Hessian is that of the loss on the split '{TRAIN}', which was not collected at checkpoint"
            f" {checkpoint} of {store.path}. Collect it there, or use 'ekfac', whose curvature may be that of any data"
        )
    if any(one.inputs is None or one.inputs.file is None for one in own):
        raise QueryError(
            f"the Hessian needs the inputs of the split '{TRAIN}', and {store.path} did not keep them: record with"
            " Recorder(..., inputs=True), or use 'ekfac', which needs none"
        )
    ids = np.concatenate([as_numpy(store.table(one.row_file).column("sample_id")) for one in own])
    return store.inputs(rows).clone(), _labels(store, ids)


def _labels(store: Store, ids: np.ndarray) -> Tensor:
    samples = tables.samples(store)
    known: dict[int, int] = {}
    if "label" in samples.column_names:
        columns = (samples.column(name).to_pylist() for name in ("split", "sample_id", "label"))
        known = {each: label for split, each, label in zip(*columns, strict=True) if split == TRAIN}
    labels = [known.get(each) for each in ids.tolist()]
    if any(not isinstance(label, int) for label in labels):
        raise QueryError(
            f"the Hessian needs the class of every sample of the split '{TRAIN}' as its label, which comes from integer"
            " targets, or metadata=. Use 'ekfac', which needs none"
        )
    return torch.tensor(labels)
