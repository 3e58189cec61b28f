"""What a store is made of: the frozen records that the manifest names.

A layer's gradient for one sample is, for a weight W of shape (output_width, input_width) and a bias:

    dC/dW = sum over positions s of  prefix_s suffix_sᵀ        dC/db = sum over s of prefix_s

with ``groups`` blocks along the diagonal for grouped convolutions: output channel o belongs to group
``o // (output_width // groups)``, and ``input_width`` is the width of one group's input.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

FACTORED = "factored"
FULL = "full"


@dataclass(frozen=True)
class Parameter:
    """A trainable parameter by its name in the model (``fc1.weight``) and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def width(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Unfold:
    """How the stored input of a convolution becomes rows, one a position.

    ``input_shape`` is (channels, *spatial) of one sample; ``padding`` holds (before, after) for each
    spatial dimension, filled with zeros. Every tuple has one entry for each spatial dimension.
    """

    input_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]


@dataclass(frozen=True)
class Layer:
    """A recorded layer: a weight with its bias, or another parameter.

    ``kind`` is ``linear``, ``conv`` or ``embedding`` (which have factors), or ``norm``, ``bias`` or
    ``parameter`` (which have none and are always laid out in full). ``parameters`` lists the weight
    first, then the bias. ``dtype`` is that on disk: ``float32``, ``float64`` or ``bfloat16``.
    For an embedding ``input_width`` is the number of rows of its table, and a suffix is a row's number.
    ``positions`` is about how many a sample has, before any are left out; None where nobody knows.
    """

    name: str
    kind: str
    parameters: tuple[Parameter, ...]
    layout: str
    dtype: str
    groups: int = 1
    input_width: int | None = None
    output_width: int | None = None
    positions: int | None = None
    unfold: Unfold | None = None

    @property
    def width(self) -> int:
        """The number of elements of the layer's gradient: all its parameters, in order."""
        return sum(parameter.width for parameter in self.parameters)

    @property
    def has_bias(self) -> bool:
        """Whether the second parameter is a bias, which adds the prefixes' own sum."""
        return len(self.parameters) == 2
