"""Reads rows, in any order, out of the record batches that hold them.

Consecutive rows within one batch come as views of the file; all else is gathered with one indexing operation
a batch, and one more where rows of several batches have to be brought into the order asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaql.storage.segments import BatchIndex, Columns

Array = np.ndarray[Any, np.dtype[Any]]
# From which tensor (by its place among the columns) how many values make a position.
Widths = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows that were read: as in ``Columns``, one tensor a column, with offsets where rows differ in length."""

    tensors: tuple[Tensor, ...]
    offsets: Tensor | None


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows that one batch holds, by their places in it."""

    columns: Columns
    local: Array


class MissingRowError(Exception):
    """No batch holds this row; caught by the store, which knows how to say it."""

    def __init__(self, row: int) -> None:
        super().__init__(row)
        self.row = row


def read_rows(index: BatchIndex, rows: Array, widths: Widths) -> Rows:
    """The rows (int64, not empty) in their order; ``widths`` are the values of a position in each column."""
    consecutive = _consecutive(index, rows)
    if consecutive is not None:
        return consecutive
    runs, order = _runs(index, rows)
    if _all_fixed_alike(runs):
        return _gather_fixed(runs, order)
    return _gather_differing(runs, order, widths)


def _consecutive(index: BatchIndex, rows: Array) -> Rows | None:
    """Views of the one batch that holds the rows one after another, if there is one."""
    first, count = int(rows[0]), len(rows)
    batch = index.at(first)
    if batch < 0 or first + count > index.ends[batch]:
        return None
    if count > 1 and (int(rows[-1]) != first + count - 1 or np.count_nonzero(rows[1:] - rows[:-1] == 1) < count - 1):
        return None
    columns = index.columns(batch)
    begin = first - index.starts[batch]
    if columns.offsets is None:
        return Rows(tuple(tensor[begin : begin + count] for tensor in columns.tensors), None)
    offsets = columns.offsets[begin : begin + count + 1]
    low, high = int(offsets[0]), int(offsets[-1])
    return Rows(tuple(tensor[low:high] for tensor in columns.tensors), torch.from_numpy(offsets - low))


def _runs(index: BatchIndex, rows: Array) -> tuple[list[_Run], Array | None]:
    """The rows by batch; and, where they had to be sorted for that, the order that was applied."""
    batches = np.searchsorted(index.start_array, rows, side="right") - 1
    outside = (batches < 0) | (rows >= index.end_array[batches])
    if outside.any():
        raise MissingRowError(int(rows[outside.argmax()]))
    order = None
    if (batches[1:] < batches[:-1]).any():
        order = np.argsort(batches, kind="stable")
        rows, batches = rows[order], batches[order]
    edges = [0, *(np.flatnonzero(batches[1:] != batches[:-1]) + 1).tolist(), len(rows)]
    runs = []
    for begin, end in pairwise(edges):
        batch = int(batches[begin])
        runs.append(_Run(index.columns(batch), rows[begin:end] - index.starts[batch]))
    return runs, order


def _all_fixed_alike(runs: list[_Run]) -> bool:
    first = runs[0].columns
    shape = [tensor.shape[1:] for tensor in first.tensors]
    return all(
        run.columns.offsets is None and [tensor.shape[1:] for tensor in run.columns.tensors] == shape for run in runs
    )


def _gather_fixed(runs: list[_Run], order: Array | None) -> Rows:
    local = [torch.from_numpy(run.local) for run in runs]
    taken = []
    for place in range(len(runs[0].columns.tensors)):
        sources = [run.columns.tensors[place] for run in runs]
        taken.append(_ordered(_take(sources, local), order))
    return Rows(tuple(taken), None)


def _gather_differing(runs: list[_Run], order: Array | None, widths: Widths) -> Rows:
    spans = [_spans(run, widths) for run in runs]
    local = [torch.from_numpy(_positions(begin, length)) for begin, length in spans]
    lengths = np.concatenate([length for _, length in spans])
    taken = [
        _take([_by_position(run.columns, place, width) for run in runs], local) for place, width in enumerate(widths)
    ]
    if order is not None:
        inverse = _inverse(order)
        begin, lengths = _offsets(lengths)[inverse], lengths[inverse]
        by_row = torch.from_numpy(_positions(begin, lengths))
        taken = [tensor.index_select(0, by_row) for tensor in taken]
    return Rows(tuple(taken), torch.from_numpy(_offsets(lengths)))


def _take(sources: list[Tensor], local: list[Tensor]) -> Tensor:
    """Entries of each source by their places in it, one source after another."""
    if len(sources) == 1:
        return sources[0].index_select(0, local[0])
    out = sources[0].new_empty(sum(len(one) for one in local), *sources[0].shape[1:])
    begin = 0
    for source, places in zip(sources, local, strict=True):
        torch.index_select(source, 0, places, out=out[begin : begin + len(places)])
        begin += len(places)
    return out


def _ordered(tensor: Tensor, order: Array | None) -> Tensor:
    return tensor if order is None else tensor.index_select(0, torch.from_numpy(_inverse(order)))


def _inverse(order: Array) -> Array:
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order))
    return inverse


def _spans(run: _Run, widths: Widths) -> tuple[Array, Array]:
    """Where each row's positions begin in its batch, and how many there are."""
    offsets = run.columns.offsets
    if offsets is not None:
        begin = offsets[run.local]
        return begin, offsets[run.local + 1] - begin
    positions = run.columns.tensors[-1].shape[1] // widths[-1]
    return run.local * positions, np.full(len(run.local), positions, dtype=np.int64)


def _positions(begin: Array, length: Array) -> Array:
    """begin[0], begin[0] + 1, … (length[0] of them), then the same for the next: int64."""
    before = np.cumsum(length) - length
    return np.repeat(begin - before, length) + np.arange(int(length.sum()), dtype=np.int64)


def _offsets(lengths: Array) -> Array:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _by_position(columns: Columns, place: int, width: int) -> Tensor:
    """A column with one entry a position; ``width`` 0 stands for plain numbers, not vectors."""
    tensor = columns.tensors[place]
    if columns.offsets is not None:
        return tensor
    return tensor.reshape(-1, width) if width else tensor.reshape(-1)
