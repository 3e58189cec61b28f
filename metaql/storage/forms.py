"""The forms in which a segment holds gradients, and what each looks like in Arrow.

========== =============================================================================================
fixed      every sample has the same number of positions: ``suffix`` and ``prefix``, a row a sample
differing  samples differ in their number of positions: ``suffix`` and ``prefix`` as lists of positions
full       ``gradient``, laid out: the weight row-major, then the bias
========== =============================================================================================

Where another layer's segment holds the same suffixes, ``suffix`` is left out.

bfloat16 has no Arrow type that every reader knows, and travels as its sixteen bits in uint16.
"""

from __future__ import annotations

from math import prod
from typing import Any

import pyarrow as pa

from metaql.storage.schema import Layer

FIXED = "fixed"
DIFFERING = "differing"
FULL = "full"

FLOATS = {"float32": pa.float32(), "float64": pa.float64(), "bfloat16": pa.uint16()}
FLOAT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2}
_INT32_ROWS = 1 << 31


def index_type(layer: Layer) -> Any:
    """The Arrow type of an embedding's row numbers."""
    assert layer.input_width is not None
    return pa.int32() if layer.input_width <= _INT32_ROWS else pa.int64()


def suffix_width(layer: Layer) -> int:
    """Values in the suffix of one position: all groups' inputs, or one row number for an embedding."""
    if layer.kind == "embedding":
        return 1
    assert layer.input_width is not None
    return layer.groups * layer.input_width


def prefix_width(layer: Layer) -> int:
    """Values in the prefix of one position: all groups' outputs."""
    assert layer.output_width is not None
    return layer.output_width


def suffix_row_width(layer: Layer, positions: int) -> int:
    """Values in the suffix of one sample: its positions', or the convolution's whole input if that is stored."""
    return prod(layer.unfold.input_shape) if layer.unfold else positions * suffix_width(layer)


def suffix_bytes(layer: Layer, rows: float, positions: float) -> float:
    """What the suffixes of so many rows, with so many positions together, take."""
    value: int = index_type(layer).bit_width // 8 if layer.kind == "embedding" else FLOAT_BYTES[layer.dtype]
    return value * (rows * prod(layer.unfold.input_shape) if layer.unfold else positions * suffix_width(layer))


def full_schema(layer: Layer) -> Any:
    """The Arrow schema of a segment of laid-out gradients."""
    return pa.schema([_column("gradient", _fixed(FLOATS[layer.dtype], layer.width))])


def fixed_schema(layer: Layer, positions: int, with_suffix: bool) -> Any:
    """The Arrow schema of a segment whose samples all have this many positions."""
    value = FLOATS[layer.dtype]
    suffix = index_type(layer) if layer.kind == "embedding" else value
    prefixes = _column("prefix", _fixed(value, positions * prefix_width(layer)))
    if not with_suffix:
        return pa.schema([prefixes])
    return pa.schema([_column("suffix", _fixed(suffix, suffix_row_width(layer, positions))), prefixes])


def differing_schema(layer: Layer, with_suffix: bool) -> Any:
    """The Arrow schema of a segment whose samples differ in their number of positions."""
    value = FLOATS[layer.dtype]
    suffix = index_type(layer) if layer.kind == "embedding" else _fixed(value, suffix_width(layer))
    prefixes = _column("prefix", _list(_fixed(value, prefix_width(layer))))
    return pa.schema([_column("suffix", _list(suffix)), prefixes] if with_suffix else [prefixes])


def _column(name: str, kind: Any) -> Any:
    return pa.field(name, kind, nullable=False)


def _fixed(value: Any, width: int) -> Any:
    return pa.list_(pa.field("item", value, nullable=False), width)


def _list(value: Any) -> Any:
    return pa.large_list(pa.field("item", value, nullable=False))
