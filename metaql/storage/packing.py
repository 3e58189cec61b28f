"""Staged blocks become record batches: a few passes over whole buffers, no work per row in Python.

This runs on the background thread and therefore in numpy, which releases the interpreter's lock for copies
and starts no threads of its own beside the training's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
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
    FLOAT_BYTES,
    FULL,
    differing_schema,
    fixed_schema,
    full_schema,
    index_type,
    prefix_width,
    suffix_bytes,
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
    """A record batch, the form it is in and what it adds to its segment's statistics.

    ``suffix_of`` names the layer whose record batch has the suffixes, where this one has none.
    """

    form: str
    batch: Any
    statistics: Statistics
    suffix_of: str | None = None


@dataclass(frozen=True)
class _Kept:
    """Which of the staged positions stay (None: all), how many there were, and where each sample's begin now."""

    mask: Array | None
    before: int
    offsets: Array

    def of(self, values: Array, width: int) -> Array:
        """Flat values of these positions, from those of all."""
        return values if self.mask is None else values.reshape(-1, width)[self.mask].reshape(-1)

    @property
    def statistics(self) -> Statistics:
        """What they add to a segment's."""
        lengths, total = np.diff(self.offsets), int(self.offsets[-1])
        return Statistics(total, self.before - total, int(lengths.min()), int(lengths.max()))


class Packer:
    """Packs what is staged of layers that have their suffixes in common.

    The suffixes are written once for all layers that keep the same positions. A layer that could do with fewer gets
    some zeros more, or a copy of its suffixes, whichever is less; one that had a copy goes on so.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        # Those that share, by their places; the first of each set has the suffixes.
        self._sets = [list(range(len(layers)))]

    def pack(
        self, staged: Staged, may_be_fixed: Callable[[int, int], bool] = lambda place, positions: True
    ) -> list[Packed]:
        """Each layer's record batch, ``fixed`` only if ``may_be_fixed`` of its place and number of positions."""
        values = [_bits(column) for column in staged.values]
        if staged.suffix is None:
            return [_full(self._layers[0], values[0])]
        masks = [_busy(layer, prefix) for layer, prefix in zip(self._layers, values, strict=True)]
        total = len(values[0]) // prefix_width(self._layers[0])
        self._sets = [part for places in self._sets for part in _divided(self._layers, places, masks, total)]
        packed: dict[int, Packed] = {}
        for places in self._sets:
            layers = [self._layers[place] for place in places]
            kept = _kept(layers, staged, _union([masks[place] for place in places]), total)
            each = _common_positions(layers[0], staged, kept)
            if each and not layers[0].unfold and not all(may_be_fixed(place, each) for place in places):
                each = None
            prefixes = [values[place] for place in places]
            packed.update(zip(places, _batches(layers, _bits(staged.suffix), prefixes, kept, each), strict=True))
        return [packed[place] for place in range(len(self._layers))]


def _full(layer: Layer, gradient: Array) -> Packed:
    schema = full_schema(layer)
    batch = pa.record_batch([_fixed_array(gradient, schema.field(0).type)], schema=schema)
    return Packed(FULL, batch, Statistics(0, 0, 0, 0))


def _batches(
    layers: Sequence[Layer], suffix: Array, prefixes: Sequence[Array], kept: _Kept, positions: int | None
) -> Iterator[Packed]:
    """The record batches of layers that share the suffixes; fixed where all samples have so many ``positions``."""
    first = layers[0]
    column = None if first.kind == "embedding" else suffix_width(first)
    shared = _as_index(first, kept.of(suffix, column or 1))
    for layer, prefix in zip(layers, prefixes, strict=True):
        own = layer is first
        values = [shared] if own else []
        values.append(kept.of(prefix, prefix_width(layer)))
        schema = fixed_schema(layer, positions, own) if positions else differing_schema(layer, own)
        columns = [
            _fixed_array(each, field.type) if positions else _lists(kept.offsets, each, field.type)
            for each, field in zip(values, schema, strict=True)
        ]
        batch = pa.record_batch(columns, schema=schema)
        yield Packed(FIXED if positions else DIFFERING, batch, kept.statistics, None if own else first.name)


def _divided(
    layers: Sequence[Layer], places: Sequence[int], masks: Sequence[Array | None], total: int
) -> list[list[int]]:
    """A set of layers as those for whom sharing their suffixes, for all positions that one of them keeps, is less."""

    def needed(some: Sequence[int]) -> float:
        mask = _union([masks[place] for place in some])
        return (total if mask is None else int(mask.sum())) * _position_bytes([layers[place] for place in some])

    if all(masks[place] is None for place in places):
        return [list(places)]
    parts: list[list[int]] = []
    for place in places:
        for part in parts:
            if needed([*part, place]) <= needed(part) + needed([place]):
                part.append(place)
                break
        else:
            parts.append([place])
    return parts


def _union(masks: Sequence[Array | None]) -> Array | None:
    known = [mask for mask in masks if mask is not None]
    return reduce(np.logical_or, known) if len(known) == len(masks) else None


def _busy(layer: Layer, flat: Array) -> Array | None:
    """Which positions have a prefix that is not all zero; None, cheaply found, when nearly all have."""
    if layer.unfold is not None:
        # They share the stored input, so none can be dropped.
        return None
    prefix = flat.reshape(-1, prefix_width(layer))
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


def _kept(layers: Sequence[Layer], staged: Staged, mask: Array | None, total: int) -> _Kept:
    """The positions of the mask, if leaving out the others is worth it."""
    if mask is not None:
        width = _position_bytes(layers)
        saved = (total - int(mask.sum())) * width - 2 * _OFFSET_BYTES * (staged.samples + 1)
        if saved >= _WORTH_DROPPING * total * width:
            before = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(mask, dtype=np.int64)])
            return _Kept(mask, total, before[staged.offsets])
    return _Kept(None, total, staged.offsets)


def _position_bytes(layers: Sequence[Layer]) -> float:
    """What a position takes of layers that share its suffix."""
    return suffix_bytes(layers[0], 1, 1) + sum(prefix_width(layer) * FLOAT_BYTES[layer.dtype] for layer in layers)


def _common_positions(layer: Layer, staged: Staged, kept: _Kept) -> int | None:
    """How many positions every sample has; None where they differ."""
    if layer.unfold is not None and staged.positions is None:
        raise InternalError(f"Samples of '{layer.name}' differ in positions, though its input is stored whole.")
    return staged.positions if kept.mask is None else None


def _bits(values: Tensor) -> Array:
    """The values as an array; bfloat16 as its bits."""
    if values.dtype == torch.bfloat16:
        return cast(Array, values.view(torch.int16).numpy().view(np.uint16))
    return cast(Array, values.numpy())


def _as_index(layer: Layer, suffix: Array) -> Array:
    if layer.kind != "embedding":
        return suffix
    return suffix.astype(index_type(layer).to_pandas_dtype(), copy=False)


def _lists(offsets: Array, values: Array, kind: Any) -> Any:
    plain = not pa.types.is_fixed_size_list(kind.value_type)
    items = primitive(values, kind.value_type) if plain else _fixed_array(values, kind.value_type)
    return pa.LargeListArray.from_arrays(primitive(offsets, pa.int64()), items, type=kind)


def _fixed_array(values: Array, kind: Any) -> Any:
    return pa.FixedSizeListArray.from_arrays(primitive(values, kind.value_type), type=kind)
