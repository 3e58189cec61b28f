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

from metaql.storage.arrow_arrays import as_numpy, primitive, truths

GRADIENT = 'STRUCT(store BIGINT, "row" BIGINT, layers VARCHAR)'
ARROW_TYPE = pa.struct([("store", pa.int64()), ("row", pa.int64()), ("layers", pa.string())])

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class References:
    """References by column, none of them NULL.

    ``code`` is the place of each one's pattern in ``patterns``; None where all have the only one there is.
    """

    store: Ints
    row: Ints
    code: Ints | None
    patterns: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.store)

    def at(self, places: Any) -> References:
        """Those at these places: a mask, a slice or an array of places."""
        code = None if self.code is None else self.code[places]
        return References(self.store[places], self.row[places], code, self.patterns)

    def only_group(self) -> tuple[int, str] | None:
        """(store, pattern) where all have the same."""
        if self.code is None and len(self) and constant(self.store):
            return int(self.store[0]), self.patterns[0]
        return None

    def groups(self) -> Iterator[tuple[int, str, Any]]:
        """(store, pattern, places) for each distinct pair of the first two; usually there is one."""
        only = self.only_group()
        if only is not None:
            yield *only, slice(None)
        if only is not None or not len(self):
            return
        code = np.zeros_like(self.store) if self.code is None else self.code
        keys = np.stack([self.store, code])
        distinct, group = np.unique(keys, axis=1, return_inverse=True)
        for number, (store, code) in enumerate(distinct.T.tolist()):
            yield store, self.patterns[code], np.flatnonzero(group.ravel() == number)


def constant(values: NDArray[Any]) -> bool:
    """Whether all are the same."""
    if len(values) < 2:
        return True
    first = values[0]
    return bool(first == values[-1] and np.count_nonzero(values == first) == len(values))


def array(values: pa.Array | pa.ChunkedArray) -> pa.Array:
    """One array of a UDF's argument, which arrives in chunks."""
    if isinstance(values, pa.ChunkedArray):
        return values.chunk(0) if values.num_chunks == 1 else values.combine_chunks()
    return values


def parts(values: pa.StructArray) -> tuple[list[pa.Array], Bools | None]:
    """store, row and layers; and where none of them is NULL, None standing for everywhere."""
    children = values.flatten()
    store, row, layers = children
    if not (store.null_count or row.null_count or layers.null_count):
        return children, None
    mask = np.ones(len(values), dtype=np.bool_)
    for child in children:
        mask &= as_numpy(child.is_valid())
    return children, mask


def read(children: list[pa.Array], mask: Bools | None) -> References:
    """The references where the mask says, which must leave out the NULL ones."""
    if mask is not None:
        chosen = truths(mask)
        children = [child.filter(chosen) for child in children]
    store, row, layers = children
    code, patterns = _patterns(layers)
    return References(as_numpy(store), as_numpy(row), code, patterns)


def _patterns(layers: pa.StringArray) -> tuple[Ints | None, tuple[str, ...]]:
    # Whole vectors are by far the most common, and known from two offsets.
    if len(layers) == 0 or _text_bytes(layers) == 0:
        return None, ("",)
    encoded = layers.dictionary_encode()
    patterns = tuple(encoded.dictionary.to_pylist())
    return None if len(patterns) == 1 else as_numpy(encoded.indices).astype(np.int64), patterns


def _text_bytes(layers: pa.StringArray) -> int:
    offsets = np.frombuffer(layers.buffers()[1], dtype=np.int32)
    return int(offsets[layers.offset + len(layers)] - offsets[layers.offset])


def write(store: Ints, row: Ints, layers: pa.Array, mask: Bools | None = None) -> pa.StructArray:
    """References as Arrow; NULL where the mask (of all rows) is false, the values standing for the others."""
    numbers = [primitive(values, pa.int64()) for values in (store, row)]
    if mask is None:
        return pa.StructArray.from_arrays([*numbers, layers], fields=list(ARROW_TYPE))
    place = primitive(np.where(mask, np.cumsum(mask) - 1, 0), pa.int64(), mask)
    children = [values.take(place) for values in (*numbers, layers)]
    return pa.StructArray.from_arrays(children, fields=list(ARROW_TYPE), mask=truths(~mask))


def scatter(values: Floats, mask: Bools | None) -> pa.Array:
    """Scores as a DOUBLE column; NULL where the mask is false."""
    if mask is None:
        return primitive(values, pa.float64())
    result = np.zeros(len(mask))
    result[mask] = values
    return primitive(result, pa.float64(), mask)
