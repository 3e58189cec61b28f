"""Arrow arrays of numpy's and Python's values, and back.

What pyarrow has for this (``pa.array``, ``pa.scalar``, ``pa.repeat``, ``to_numpy``, ``empty_table``) looks for pandas
objects, and for that imports pandas wherever it is installed. That takes longer than most queries.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

Values = np.ndarray[Any, np.dtype[Any]]


def primitive(values: Values, kind: Any, there: Values | None = None) -> Any:
    """A flat contiguous array of plain numbers as an Arrow array of this type, without a copy.

    It is NULL where ``there``, booleans, is false.
    """
    return pa.Array.from_buffers(kind, len(values), [None if there is None else _bits(there), pa.py_buffer(values)])


def truths(values: Values) -> Any:
    """Booleans as an Arrow array."""
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, _bits(values)])


def column(values: Sequence[Any], kind: Any) -> Any:
    """Python's numbers, booleans or strings as an Arrow array of this type, NULL where they are None."""
    there = np.array([value is not None for value in values], dtype=np.bool_)
    buffers = [None if there.all() else _bits(there)]
    if kind == pa.string():
        texts = [b"" if value is None else value.encode() for value in values]
        offsets = np.cumsum([0, *map(len, texts)]).astype(np.int32)
        buffers += [pa.py_buffer(offsets), pa.py_buffer(b"".join(texts))]
    elif kind == pa.bool_():
        buffers.append(_bits(np.array([bool(value) for value in values], dtype=np.bool_)))
    else:
        numbers = np.array([0 if value is None else value for value in values], dtype=kind.to_pandas_dtype())
        buffers.append(pa.py_buffer(numbers))
    return pa.Array.from_buffers(kind, len(values), buffers)


def repeated(value: Any, kind: Any, count: int) -> Any:
    """A number, a boolean, a string or None, so many times, as an Arrow array of this type."""
    return column([value], kind).take(primitive(np.zeros(count, np.int8), pa.int8()))


def empty(schema: Any) -> Any:
    """A table without rows."""
    return pa.table([pa.nulls(0, field.type) for field in schema], schema=schema)


def as_numpy(values: Any) -> Values:
    """Numbers or booleans of an array or a chunked one without NULLs; an array's numbers are not copied."""
    if isinstance(values, pa.ChunkedArray):
        chunks = [as_numpy(chunk) for chunk in values.chunks]
        return np.concatenate(chunks) if chunks else np.zeros(0, dtype=values.type.to_pandas_dtype())
    if not pa.types.is_boolean(values.type):
        return np.from_dlpack(values)
    bits = np.unpackbits(np.frombuffer(values.buffers()[1], dtype=np.uint8), bitorder="little")
    return bits[values.offset : values.offset + len(values)].astype(np.bool_)


def _bits(values: Values) -> Any:
    return pa.py_buffer(np.packbits(values, bitorder="little"))
