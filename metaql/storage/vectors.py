"""Reads logits and embeddings: rows of list columns, of files that are mapped and of which nothing else is touched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa

from metaql.storage.manifest import DataFile
from metaql.storage.mapped_file import MappedFile
from metaql.storage.vector_writer import VECTOR_SCHEMA

Array = np.ndarray[Any, np.dtype[Any]]
# A collection's file, if it has one, by the collection's place in the manifest.
FileOf = Callable[[int], DataFile | None]


def read_vectors(
    open_file: Callable[[DataFile], MappedFile], file_of: FileOf, starts: Array, rows: Array, column: str
) -> Any:
    """``values`` or ``shape`` of these rows, in this order, as one Arrow array; NULL where there is no file.

    Rows that follow one another in a record batch are a view of its file. ``starts`` are the collections' first rows.
    """
    collections = np.searchsorted(starts, rows, side="right") - 1
    parts, places = [], []
    for number in np.unique(collections).tolist():
        own = np.flatnonzero(collections == number)
        file = file_of(number)
        if file is None:
            parts.append(pa.nulls(len(own), VECTOR_SCHEMA.field(column).type))
            places.append(own)
            continue
        ends = np.cumsum([batch.rows for batch in file.batches])
        inside = rows[own] - starts[number]
        batches = np.searchsorted(ends, inside, side="right")
        for batch in np.unique(batches).tolist():
            here = np.flatnonzero(batches == batch)
            first = ends[batch] - file.batches[batch].rows
            parts.append(_taken(open_file(file).batch(batch).column(column), inside[here] - first))
            places.append(own[here])
    return in_order(parts, places, VECTOR_SCHEMA.field(column).type)


def _taken(values: Any, places: Array) -> Any:
    if int(places[-1]) - int(places[0]) == len(places) - 1 and (np.diff(places) == 1).all():
        return values.slice(int(places[0]), len(places))
    return values.take(pa.array(places))


def in_order(parts: list[Any], places: list[Array], kind: Any) -> Any:
    """The parts as one array, in which each value stands at its place."""
    if not parts:
        return pa.nulls(0, kind)
    joined = parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
    order = np.concatenate(places)
    return joined if (np.diff(order) > 0).all() else joined.take(pa.array(np.argsort(order)))
