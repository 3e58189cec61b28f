"""What the model put out for a row, behind the columns ``shape``, ``embedding`` and ``logits`` of the relations.

Only rows that a query looks at are read, from mapped files, and none of them before it does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from metaql.storage.store import Store
from metaql.storage.vector_writer import VECTOR_SCHEMA
from metaql.storage.vectors import in_order
from metaql.udfs import references
from metaql.udfs.function import Function
from metaql.udfs.references import Ints
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource

EMBEDDING, SHAPE, LOGITS = "metaql_embedding", "metaql_shape", "metaql_logits"


def embedding(session: Session) -> Function:
    """``metaql_embedding(store, layer, row)``: the output of a module, flat; NULL where it was not kept."""
    return _of_layer(session, EMBEDDING, "values", "FLOAT[]")


def shape(session: Session) -> Function:
    """``metaql_shape(store, layer, row)``: the shape of that output."""
    return _of_layer(session, SHAPE, "shape", "INTEGER[]")


def logits(session: Session) -> Function:
    """``metaql_logits(store, row)``: the logits; NULL where they were not kept."""

    def evaluate(stores: Any, rows: Any) -> pa.Array:
        found = _read(session, _integers(stores), _integers(rows), Store.logits)
        return in_order(*found, VECTOR_SCHEMA.field("values").type)

    return Function(LOGITS, ("BIGINT", "BIGINT"), "FLOAT[]", evaluate)


def _of_layer(session: Session, name: str, column: str, returns: str) -> Function:
    def evaluate(stores: Any, layers: Any, rows: Any) -> pa.Array:
        stores, rows = _integers(stores), _integers(rows)
        encoded = references.array(layers).dictionary_encode()
        codes, parts, places = encoded.indices.to_numpy(), [], []
        for code, layer in enumerate(encoded.dictionary.to_pylist()):
            own = np.flatnonzero(codes == code)
            read = partial(_embeddings, layer=layer, column=column)
            found, where = _read(session, stores[own], rows[own], read)
            parts += found
            places += [own[each] for each in where]
        return in_order(parts, places, VECTOR_SCHEMA.field(column).type)

    return Function(name, ("BIGINT", "VARCHAR", "BIGINT"), returns, evaluate)


def _embeddings(store: Store, rows: Ints, layer: str, column: str) -> pa.Array:
    return store.embeddings(layer, rows, column)


def _read(
    session: Session, stores: Ints, rows: Ints, read: Callable[[Store, Ints], pa.Array]
) -> tuple[list[pa.Array], list[Ints]]:
    """What each store has for those of the rows that are its own, and the places of these."""
    parts, places = [], []
    for store in np.unique(stores).tolist():
        own = np.flatnonzero(stores == store)
        for source, inner in session.resolve(store, rows[own]):
            assert isinstance(source, StoreSource)
            parts.append(read(source.store, rows[own[inner]]))
            places.append(own[inner])
    return parts, places


def _integers(values: Any) -> Ints:
    found: Ints = references.array(values).to_numpy()
    return found
