"""What every SQL function is made of, and how NULLs and torch's threads are kept out of its way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import torch

from metaql.udfs import references
from metaql.udfs.references import Bools, Floats, References


@dataclass(frozen=True)
class Function:
    """A scalar SQL function: its name, DuckDB types, and what computes a column from its arguments' columns.

    ``parameters`` None: any number of arguments, of any types.
    """

    name: str
    parameters: tuple[str, ...] | None
    returns: str
    evaluate: Callable[..., pa.Array]


def one_thread() -> AbstractContextManager[None]:
    """torch keeps to the calling thread: DuckDB calls functions from all its threads at once."""
    return torch_threads(1)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """torch computes with so many threads what this thread asks for. Each thread of Python has a number of its own."""
    before = torch.get_num_threads()
    if before != count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if before != count:
            torch.set_num_threads(before)


def both(left: Any, right: Any) -> tuple[References, References, Bools | None]:
    """Two GRADIENT columns where neither is NULL, and that mask."""
    left, there = references.parts(references.array(left))
    right, here = references.parts(references.array(right))
    mask = conjunction(there, here)
    return references.read(left, mask), references.read(right, mask), mask


def one(values: Any) -> tuple[References, Bools | None]:
    """A GRADIENT column where it is not NULL, and that mask."""
    children, mask = references.parts(references.array(values))
    return references.read(children, mask), mask


def conjunction(left: Bools | None, right: Bools | None) -> Bools | None:
    """Both masks; None stands for true everywhere."""
    if left is None:
        return right
    return left if right is None else left & right


def scores(values: Floats, mask: Bools | None) -> pa.Array:
    """A DOUBLE column, NULL where the mask is false."""
    return references.scatter(values, mask)
