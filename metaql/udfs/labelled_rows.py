"""Rows that came as a list of structs: which column is what."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metaql.errors import QueryError
from metaql.storage.arrow_arrays import as_numpy
from metaql.udfs.feature_rows import GivenRows, fields_of
from metaql.udfs.references import Bools

SAMPLE_ID = "sample_id"
IS_ANOMALY = "is_anomaly"


def given_rows(where: str, structs: Any) -> GivenRows:
    """All columns of the structs but ``sample_id`` and ``is_anomaly``, as features; the former says what rows are."""
    columns = fields_of(where, structs)
    features = {name: column for name, column in columns.items() if name.lower() not in (SAMPLE_ID, IS_ANOMALY)}
    return GivenRows(where, features, column_of(structs, SAMPLE_ID))


def column_of(structs: Any, name: str) -> Any:
    """The column of a name, in whatever case; None where there is none."""
    fields = zip(structs.type, structs.flatten(), strict=True)
    return next((column for field, column in fields if field.name.lower() == name), None)


def labels(given: GivenRows, structs: Any) -> tuple[Bools, Bools]:
    """Which rows are anomalies, and which have a label at all; true and false, or 1 and 0.

    QueryError for other values, and where there is no such column.
    """
    column = column_of(structs, IS_ANOMALY)
    how = "give TRUE (or 1) for an anomaly, FALSE (or 0) for a normal row, and NULL where it is not known"
    if column is None:
        raise QueryError(f"{given.where}: there is no column is_anomaly: {how}")
    kind, types = column.type, pa.types
    if types.is_null(kind):
        return np.zeros(len(column), np.bool_), np.zeros(len(column), np.bool_)
    if not any(fits(kind) for fits in (types.is_boolean, types.is_integer, types.is_floating, types.is_decimal)):
        raise QueryError(
            f"{given.where}: is_anomaly must be a BOOLEAN, and {given.row(0)} has {column[0].as_py()!r}: {how}, as in"
            " SELECT …, verdict = 'anomaly' AS is_anomaly"
        )
    there = as_numpy(column.is_valid())
    values = as_numpy(pc.fill_null(column.cast(pa.float64(), safe=False), 0.0))
    wrong = np.flatnonzero((values != 0) & (values != 1))
    if len(wrong):
        place = int(wrong[0])
        raise QueryError(
            f"{given.where}: is_anomaly must be TRUE or FALSE (or 1 or 0), and {given.row(place)} has"
            f" {column[place].as_py()}: {how}"
        )
    return values == 1, there
