"""Writes the samples' inputs of one collection, one row a sample."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from metaql.errors import BatchError
from metaql.storage.arrow_writer import ArrowWriter
from metaql.storage.manifest import Inputs

# Half types travel as their bits, as gradients do; a boolean is a byte, as in torch.
_ARROW_TYPES = {
    torch.float64: pa.float64(),
    torch.float32: pa.float32(),
    torch.float16: pa.uint16(),
    torch.bfloat16: pa.uint16(),
    torch.int64: pa.int64(),
    torch.int32: pa.int32(),
    torch.int16: pa.int16(),
    torch.int8: pa.int8(),
    torch.uint8: pa.uint8(),
    torch.bool: pa.uint8(),
}


class InputWriter:
    """Inputs of one shape and type; BatchError for others."""

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if dtype not in _ARROW_TYPES:
            raise BatchError(f"Inputs of type {dtype} can't be kept: record with inputs=False, or convert them.")
        self._shape = shape
        self._dtype = dtype
        self._item = pa.field("item", _ARROW_TYPES[dtype], nullable=False)
        kind = pa.list_(self._item, prod(shape))
        self._schema = pa.schema([pa.field("input", kind, nullable=False)])
        self._writer = ArrowWriter(folder / "inputs.arrow", self._schema)

    def require_like(self, inputs: Tensor) -> None:
        """BatchError unless these inputs have the shape and type of those before."""
        if tuple(inputs.shape[1:]) != self._shape or inputs.dtype != self._dtype:
            raise BatchError(
                f"An input of shape {tuple(inputs.shape[1:])} and type {inputs.dtype} came after inputs of shape "
                f"{self._shape} and type {self._dtype}; one collection keeps one kind. Record with inputs=False, "
                "or pad the inputs to one shape."
            )

    def write(self, pieces: Sequence[Tensor]) -> None:
        """Appends the inputs, [n, *shape] each."""
        values = torch.cat([piece.reshape(-1) for piece in pieces])
        flat = pa.Array.from_buffers(
            self._item.type, len(values), [None, pa.py_buffer(values.view(torch.uint8).numpy())]
        )
        column = pa.FixedSizeListArray.from_arrays(flat, type=self._schema.field(0).type)
        self._writer.write(pa.record_batch([column], schema=self._schema))

    def close(self) -> Inputs:
        """Completes the file and brings it to the disk."""
        return Inputs(self._writer.close(), self._shape, str(self._dtype).removeprefix("torch."))

    def abandon(self) -> None:
        """Closes the file as it is."""
        self._writer.abandon()
