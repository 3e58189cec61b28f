"""One use of a parameter by a torch function, in the form that all operations share.

Whatever the function, a sample's gradient of its weight is a sum over positions of a product of two
vectors: the prefix (dC/dy at that position) and the suffix (what the weight was multiplied with). The
product is the outer one for linear maps and convolutions, picks a table's row for embeddings, and goes
element by element for the scales of normalisations. A bias has the prefixes' own sum as its gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from metaql.storage.schema import Unfold


@dataclass(frozen=True)
class Operation:
    """A kind of operation with factors.

    ``suffix(use)`` and ``prefix(use, dy)`` return tensors whose first ``use.leading`` dimensions are those
    of the input (samples and positions, in whatever order the model keeps them), then further positions,
    and last the vector itself; an embedding's suffix has no last dimension.
    """

    kind: str
    suffix: Callable[[Use], Tensor]
    prefix: Callable[[Use, Tensor], Tensor]


@dataclass(frozen=True)
class Use:
    """One call of a torch function: its input, and the tensors that stand in the places of weight and bias.

    ``leading`` counts the dimensions of the input that hold samples and positions. ``settings`` is all
    else that the factors depend on, hashable. ``geometry`` is set where the input itself can be kept
    and unfolded later.
    """

    operation: Operation
    inputs: Tensor
    weight: Tensor | None
    bias: Tensor | None
    leading: int
    groups: int = 1
    settings: tuple[Any, ...] = ()
    geometry: Unfold | None = None
