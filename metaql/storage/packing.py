"""Staged blocks become one record batch: a few passes over whole buffers, no work per row in Python.

This runs on the background thread and therefore in numpy, which releases the interpreter's lock for copies
and starts no threads of its own beside the training's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from metaql.errors import InternalError
from metaql.storage.arrow_arrays import primitive
from metaql.storage.forms import (
    DIFFERING,
    FIXED,
    FULL,
    differing_schema,
    fixed_schema,
    full_schema,
    index_type,
    prefix_width,
    suffix_width,
)
from metaql.storage.manifest import Statistics
from metaql.storage.schema import Layer
from metaql.storage.staging import Staged

# Dropping zero positions costs a pass over them and slower reads: it has to save this much.
_WORTH_DROPPING = 0.1
_OFFSET_BYTES = 8
_PROBED_COLUMNS = 4

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Packed:
    """A record batch, the form it is in and what it adds to its segment's statistics."""

    form: str
    batch: Any
    statistics: Statistics


@dataclass(frozen=True)
class _Positions:
    """Positions of several samples: flat suffix and prefix values, and where each sample's begin."""

    suffix: Array
    prefix: Array
    offsets: Array


def pack(layer: Layer, staged: Staged, may_be_fixed: bool) -> Packed:
    """The samples in the form that suits them; fixed only if ``may_be_fixed``."""
    values = [_bits(column) for column in staged.values]
    if layer.layout == FULL:
        return _full(layer, values[0])
    suffix, prefix = values
    if layer.unfold is not None:
        # Positions share the stored input, so none can be dropped, and all samples have as many.
        if staged.positions is None:
            raise InternalError(f"Samples of '{layer.name}' differ in positions, though its input is stored whole.")
        return _fixed_from(layer, suffix, prefix, staged.positions)
    keep = _kept(prefix.reshape(-1, prefix_width(layer)))
    positions = len(prefix) // prefix_width(layer)
    found = _Positions(suffix, prefix, staged.offsets)
    if keep is None or not _worth_dropping(layer, int(keep.sum()), positions, staged.samples):
        if staged.positions and may_be_fixed:
            return _fixed_from(layer, suffix, prefix, staged.positions)
        return _differing(layer, found, positions)
    return _differing(layer, _drop(layer, found, keep), positions)


def _full(layer: Layer, gradient: Array) -> Packed:
    schema = full_schema(layer)
    batch = pa.record_batch([_fixed_array(gradient, schema.field(0).type)], schema=schema)
    return Packed(FULL, batch, Statistics(0, 0, 0, 0))


def _fixed_from(layer: Layer, suffix: Array, prefix: Array, positions: int) -> Packed:
    schema = fixed_schema(layer, positions)
    columns = [
        _fixed_array(_as_index(layer, suffix), schema.field("suffix").type),
        _fixed_array(prefix, schema.field("prefix").type),
    ]
    batch = pa.record_batch(columns, schema=schema)
    return Packed(FIXED, batch, Statistics(batch.num_rows * positions, 0, positions, positions))


def _differing(layer: Layer, kept: _Positions, before: int) -> Packed:
    schema = differing_schema(layer)
    offsets = primitive(kept.offsets, pa.int64())
    suffix = _as_index(layer, kept.suffix)
    value = schema.field("suffix").type.value_type
    items = primitive(suffix, value) if layer.kind == "embedding" else _fixed_array(suffix, value)
    prefixes = _fixed_array(kept.prefix, schema.field("prefix").type.value_type)
    columns = [
        pa.LargeListArray.from_arrays(offsets, items, type=schema.field("suffix").type),
        pa.LargeListArray.from_arrays(offsets, prefixes, type=schema.field("prefix").type),
    ]
    lengths = np.diff(kept.offsets)
    total = int(kept.offsets[-1])
    statistics = Statistics(total, before - total, int(lengths.min()), int(lengths.max()))
    return Packed(DIFFERING, pa.record_batch(columns, schema=schema), statistics)


def _kept(prefix: Array) -> Array | None:
    """Which positions have a prefix that is not all zero; None, cheaply found, when nearly all have."""
    values = prefix.view(np.int16) if prefix.dtype == np.uint16 else prefix
    candidates = np.flatnonzero(_is_zero(prefix, values[:, 0]))
    for column in range(1, min(_PROBED_COLUMNS, prefix.shape[1])):
        if len(candidates) < _WORTH_DROPPING * len(prefix):
            return None
        candidates = candidates[_is_zero(prefix, values[candidates, column])]
    if not len(candidates) or len(candidates) < _WORTH_DROPPING * len(prefix):
        return None
    keep = np.ones(len(prefix), dtype=bool)
    keep[candidates] = ~_is_zero(prefix, values[candidates]).all(axis=1)
    return keep


def _is_zero(prefix: Array, values: Array) -> Array:
    """Elementwise; for the bits of a bfloat16 both zeros count, as they do for floats."""
    if prefix.dtype == np.uint16:
        return cast(Array, (values & 0x7FFF) == 0)
    return cast(Array, values == 0)


def _worth_dropping(layer: Layer, kept: int, positions: int, rows: int) -> bool:
    value_bytes = torch.finfo(getattr(torch, layer.dtype)).bits // 8
    suffix_bytes = index_type(layer).bit_width // 8 if layer.kind == "embedding" else suffix_width(layer) * value_bytes
    position_bytes = suffix_bytes + prefix_width(layer) * value_bytes
    saved = (positions - kept) * position_bytes - 2 * _OFFSET_BYTES * (rows + 1)
    return saved >= _WORTH_DROPPING * positions * position_bytes


def _drop(layer: Layer, all_: _Positions, keep: Array) -> _Positions:
    before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(keep, dtype=np.int64)])
    suffix = all_.suffix.reshape(-1, suffix_width(layer))[keep]
    prefix = all_.prefix.reshape(-1, prefix_width(layer))[keep]
    return _Positions(suffix.reshape(-1), prefix.reshape(-1), before[all_.offsets])


def _bits(values: Tensor) -> Array:
    """The values as an array; bfloat16 as its bits."""
    if values.dtype == torch.bfloat16:
        return cast(Array, values.view(torch.int16).numpy().view(np.uint16))
    return cast(Array, values.numpy())


def _as_index(layer: Layer, suffix: Array) -> Array:
    if layer.kind != "embedding":
        return suffix
    return suffix.astype(index_type(layer).to_pandas_dtype(), copy=False)


def _fixed_array(values: Array, kind: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(primitive(values, kind.value_type), type=kind)
