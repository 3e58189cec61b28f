"""What users know about their samples: any Arrow table with a ``sample_id`` column."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metaql.errors import BatchError, SampleIdError
from metaql.storage.arrow_arrays import primitive
from metaql.storage.group import Group
from metaql.storage.store import Store

# Columns that the relations add to the user's own.
RESERVED = ("split", "checkpoint", "step", "row", "loss", "prediction", "confidence", "gradient")


def as_table(metadata: Any) -> pa.Table:
    """metadata as an Arrow table with int64 ids, checked by itself; anything with the Arrow PyCapsule interface."""
    try:
        table = pa.table(metadata)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise BatchError(
            f"metadata is a {type(metadata).__name__}, which is not a table: {error}. Pass a DataFrame "
            "(pandas, polars), an Arrow table or a dict of columns."
        ) from error
    if "sample_id" not in table.column_names:
        raise BatchError(f"metadata has no column 'sample_id'; it has {', '.join(table.column_names) or 'none'}.")
    # SQL does not tell names by their case.
    names = [name.lower() for name in table.column_names]
    clashing = [name for name in table.column_names if name.lower() in RESERVED or names.count(name.lower()) > 1]
    if clashing:
        raise BatchError(f"metadata can't have a column '{clashing[0]}': the name is taken. Rename it.")
    ids = _ids(table.column("sample_id"))
    place = table.column_names.index("sample_id")
    return _plain(table.set_column(place, "sample_id", ids))


def shared(table: pa.Table | None, group: Group) -> pa.Table | None:
    """The table of this rank, or rank 0's if this one has none."""
    given = group.gather(table if group.leads else None)[0]
    return given if table is None else table


def require_agreeing(table: pa.Table | None, group: Group) -> None:
    """Raises if the ranks' tables have a column of different types."""
    schemas = [each for each in group.gather(None if table is None else table.schema) if each is not None]
    try:
        pa.unify_schemas([pa.schema([]), *schemas], promote_options="permissive")
    except pa.ArrowException as error:
        raise BatchError(
            f"The ranks' metadata do not go together: {error}. Convert their columns to one type."
        ) from error


def _plain(table: pa.Table) -> pa.Table:
    """Without what pandas noted, and without the view types of polars, which few kernels of Arrow take."""
    views = {pa.string_view(): pa.string(), pa.binary_view(): pa.binary()}
    fields = [field.with_type(views.get(field.type, field.type)) for field in table.schema]
    return table.replace_schema_metadata(None).cast(pa.schema(fields))


def _ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_integer(column.type):
        raise SampleIdError(f"metadata's sample_id is {column.type}; sample ids are integers.")
    if column.null_count:
        raise SampleIdError(f"metadata's sample_id is NULL in {column.null_count} rows; every row needs an id.")
    counts = pc.value_counts(column.combine_chunks())
    repeated = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(repeated):
        raise SampleIdError(f"metadata has several rows for sample {repeated[0]['values']}; give one.")
    return column.cast(pa.int64())


def for_samples(table: pa.Table | None, ids: np.ndarray, labels: np.ndarray | None) -> pa.Table | None:
    """The rows about these samples, with ``label`` from the batches unless the user gave one; None without columns."""
    if table is not None:
        known = np.isin(ids, table.column("sample_id").to_numpy())
        if not known.all():
            warnings.warn(
                f"metadata has no row for {int((~known).sum())} of {len(ids)} samples, such as {ids[~known][0]}; their "
                "columns are NULL.",
                stacklevel=4,
            )
        table = table.filter(pc.is_in(table.column("sample_id"), pa.array(ids)))
    if labels is None or (table is not None and "label" in map(str.lower, table.column_names)):
        return table
    own = pa.table({"sample_id": primitive(ids, pa.int64()), "label": primitive(labels, pa.int64())})
    if table is None:
        return own
    places = pc.index_in(own.column("sample_id"), table.column("sample_id").combine_chunks())
    others = table.drop_columns("sample_id").take(places)
    return pa.table([*own.columns, *others.columns], names=[*own.column_names, *others.column_names])


def require_same_types(table: pa.Table, store: Store) -> None:
    """Raises if a column has another type than the same column of earlier collections."""
    kept = [each.metadata for each in store.manifest.collections if each.metadata]
    earlier = {field.name: field for file in kept for field in store.table(file).schema}
    for field in table.schema:
        before = earlier.get(field.name, field)
        try:
            pa.unify_schemas([pa.schema([before]), pa.schema([field])], promote_options="permissive")
        except pa.ArrowException:
            raise BatchError(
                f"metadata's column '{field.name}' is {field.type}, and {before.type} in what was recorded before. "
                "Convert it, or give it another name."
            ) from None
