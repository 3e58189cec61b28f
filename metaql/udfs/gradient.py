"""``gradient(input, target) -> GRADIENT``: of a sample that was never recorded, by running the model.

The connection must have been given the model. ``input`` is flattened row by row; its shape and type are those of
the recorded inputs where the store has them (``Recorder(…, inputs=True)``), else it is a vector of floats.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from metaql.udfs import references
from metaql.udfs.definitions import Replayed
from metaql.udfs.function import Function
from metaql.udfs.references import GRADIENT
from metaql.udfs.session import Session


def gradient(session: Session) -> Function:
    """NULL where the input, a number in it, or the target is NULL."""

    def evaluate(inputs: Any, targets: Any) -> pa.Array:
        inputs, targets = references.array(inputs), references.array(targets)
        samples = zip(inputs, targets, strict=True)
        numbers = [_number(session, sample, target) for sample, target in samples]
        mask = np.array([number is not None for number in numbers], dtype=np.bool_)
        found = np.array([number for number in numbers if number is not None], dtype=np.int64)
        stores = np.full(len(found), session.id, dtype=np.int64)
        return references.write(stores, found, pa.array([""] * len(found), pa.string()), mask)

    return Function("gradient", ("DOUBLE[]", "BIGINT"), GRADIENT, evaluate)


def _number(session: Session, sample: pa.Scalar, target: pa.Scalar) -> int | None:
    if not sample.is_valid or not target.is_valid or sample.values.null_count:
        return None
    model = session.model()
    prepared = model.prepare(sample.values.to_numpy())
    return session.vectors.add(Replayed(model.source.name, prepared, target.as_py(), model.source.space))
