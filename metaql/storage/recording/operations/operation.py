"""One use of a parameter by a torch function, in the form that all operations share.

Whatever the function, a sample's gradient of its weight is a sum over positions of a product of two
vectors: the prefix (dC/dy at that position) and the suffix (what the weight was multiplied with). The
product is the outer one for linear maps and convolutions, picks a table's row for embeddings, and goes
element by element for the scales of normalisations. A bias has the prefixes' own sum as its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaql.storage.schema import Unfold


def _own_input(use: Use, dy: Tensor) -> Tensor:
    return use.inputs


def _unmarked(use: Use) -> Hashable:
    return None


@dataclass(frozen=True)
class Operation:
    """A kind of operation with factors.

    ``suffix(use, dy)`` and ``prefix(use, dy)`` return tensors whose first dimensions are ``use.axes`` of the
    output (samples and positions, in whatever order the model keeps them), then further positions, and last
    the vector itself; an embedding's suffix has no last dimension. ``kept(use, dy)`` is what ``use.geometry``
    unfolds. ``reads_input`` says that all these depend on the values of the use's input. ``suffix_mark(use)`` is equal
    for uses that make the same suffix of the same input, and None where dy has a part in it.
    """

    kind: str
    suffix: Callable[[Use, Tensor], Tensor]
    prefix: Callable[[Use, Tensor], Tensor]
    kept: Callable[[Use, Tensor], Tensor] = _own_input
    reads_input: bool = True
    suffix_mark: Callable[[Use], Hashable] = _unmarked


@dataclass(frozen=True)
class Use:
    """One call of a torch function: its input, and the tensors that stand in the places of weight and bias.

    ``axes`` are the dimensions of the output that hold samples and positions. ``settings`` is all else that
    the factors depend on, hashable. ``geometry`` is set where what the suffix is made of can be kept itself
    and unfolded later.
    """

    operation: Operation
    inputs: Tensor
    weight: Tensor | None
    bias: Tensor | None
    axes: tuple[int, ...]
    groups: int = 1
    settings: tuple[Any, ...] = ()
    geometry: Unfold | None = None

    def lead(self, values: Tensor) -> Tensor:
        """Values of the output's shape with ``axes`` in front; a view."""
        return in_front(values, self.axes)


def in_front(values: Tensor, axes: tuple[int, ...]) -> Tensor:
    """A view of the values with these dimensions first."""
    return values.movedim(axes, tuple(range(len(axes))))


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
