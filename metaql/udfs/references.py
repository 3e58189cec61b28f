"""GRADIENT values: what a gradient column holds, from and to Arrow.

A reference is ``STRUCT(store BIGINT, row BIGINT, layers VARCHAR)``: the store's id, a row of it, and a layer
pattern, ``''`` for the whole vector. A STRUCT, so that ``avg(gradient)`` in plain DuckDB is a binder error and
not an average of row numbers. NULL, or a NULL inside, is no gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

GRADIENT = 'STRUCT(store BIGINT, "row" BIGINT, layers VARCHAR)'
ARROW_TYPE = pa.struct([("store", pa.int64()), ("row", pa.int64()), ("layers", pa.string())])

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class References:
    """References by column, none of them NULL. ``code`` is the place of a pattern in ``patterns``."""

    store: Ints
    row: Ints
    code: Ints
    patterns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.store)

    def at(self, places: Any) -> References:
        """Those at these places: a mask, a slice or an array of places."""
        return References(self.store[places], self.row[places], self.code[places], self.patterns)

    def groups(self) -> Iterator[tuple[int, str, Any]]:
        """(store, pattern, places) for each distinct pair of the first two; usually there is one."""
        if constant(self.store) and constant(self.code):
            if len(self):
                yield int(self.store[0]), self.patterns[self.code[0]], slice(None)
            return
        keys = np.stack([self.store, self.code])
        distinct, group = np.unique(keys, axis=1, return_inverse=True)
        for number, (store, code) in enumerate(distinct.T.tolist()):
            yield store, self.patterns[code], np.flatnonzero(group.ravel() == number)


def constant(values: NDArray[Any]) -> bool:
    """Whether all are the same."""
    return len(values) < 2 or (values[0] == values[-1] and bool((values == values[0]).all()))


def array(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array of a UDF's argument, which arrives in chunks."""
    if isinstance(values, pa.ChunkedArray):
        return values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    return values


def valid(values: pa.StructArray) -> Bools | None:
    """Where there is a gradient; None when everywhere."""
    children = [values.field(place) for place in range(3)]
    if values.null_count == 0 and not any(child.null_count for child in children):
        return None
    mask = np.ones(len(values), dtype=np.bool_)
    for part in (values, *children):
        if part.null_count:
            mask &= part.is_valid().to_numpy(zero_copy_only=False)
    return mask


def read(values: pa.StructArray, mask: Bools | None = None) -> References:
    """The references where the mask says, which must leave out the NULL ones."""
    store, row, layers = (values.field(place) for place in range(3))
    if mask is not None:
        chosen = pa.array(mask)
        store, row, layers = store.filter(chosen), row.filter(chosen), layers.filter(chosen)
    code, patterns = _patterns(layers)
    return References(store.to_numpy(), row.to_numpy(), code, patterns)


def _patterns(layers: pa.StringArray) -> tuple[Ints, tuple[str, ...]]:
    # Whole vectors are by far the most common, and known from two offsets.
    if len(layers) == 0 or _text_bytes(layers) == 0:
        return np.zeros(len(layers), dtype=np.int64), ("",)
    encoded = layers.dictionary_encode()
    return encoded.indices.to_numpy().astype(np.int64), tuple(encoded.dictionary.to_pylist())


def _text_bytes(layers: pa.StringArray) -> int:
    offsets = np.frombuffer(layers.buffers()[1], dtype=np.int32)
    return int(offsets[layers.offset + len(layers)] - offsets[layers.offset])


def write(store: Ints, row: Ints, layers: pa.Array, mask: Bools | None = None) -> pa.StructArray:
    """References as Arrow; NULL where the mask (of all rows) is false, the values standing for the others."""
    if mask is None:
        return pa.StructArray.from_arrays([pa.array(store), pa.array(row), layers], fields=list(ARROW_TYPE))
    place = pa.array(np.where(mask, np.cumsum(mask) - 1, 0), mask=~mask)
    children = [values.take(place) for values in (pa.array(store), pa.array(row), layers)]
    return pa.StructArray.from_arrays(children, fields=list(ARROW_TYPE), mask=pa.array(~mask))


def scatter(values: Floats, mask: Bools | None) -> pa.Array:
    """Scores as a DOUBLE column; NULL where the mask is false."""
    if mask is None:
        return pa.array(values)
    result = np.zeros(len(mask))
    result[mask] = values
    return pa.array(result, mask=~mask)
