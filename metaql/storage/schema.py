"""What a store is made of: the frozen records that the manifest names.

A layer's gradient for one sample is, for a weight W of shape (output_width, input_width) and a bias:

    dC/dW = sum over positions s of  prefix_s suffix_sᵀ        dC/db = sum over s of prefix_s

with ``groups`` blocks along the diagonal for grouped convolutions: output channel o belongs to group
``o // (output_width // groups)``, and ``input_width`` is the width of one group's input.

A weight that is both an output projection and an embedding's table has the sum of two such gradients: a ``tied`` layer,
which is stored and computed with as its two parts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

FACTORED = "factored"
FULL = "full"
TIED = "tied"


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

    ``kind`` is ``linear``, ``conv``, ``embedding`` or ``tied`` (which have factors), or ``norm``, ``bias`` or
    ``parameter`` (which have none and are always laid out in full). ``parameters`` lists the weight
    first, then the bias. ``dtype`` is that on disk: ``float32``, ``float64`` or ``bfloat16``.
    For an embedding ``input_width`` is the number of rows of its table, and a suffix is a row's number.
    ``positions`` is about how many a sample has, before any are left out; None where nobody knows.
    ``looked_up`` is as many as that of a tied layer's table; its other fields are those of the projection.
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
    looked_up: int | None = None

    @property
    def width(self) -> int:
        """The number of elements of the layer's gradient: all its parameters, in order."""
        return sum(parameter.width for parameter in self.parameters)

    @property
    def has_bias(self) -> bool:
        """Whether the second parameter is a bias, which adds the prefixes' own sum."""
        return len(self.parameters) == 2


def parts(layer: Layer) -> tuple[Layer, ...]:
    """What a layer's factors are those of: a tied layer's projection and table, any other layer itself."""
    return _tied_parts(layer) if layer.kind == TIED else (layer,)


def stored_parts(layer: Layer) -> tuple[Layer, ...]:
    """What has segments of its own: a layer's parts, as long as it is kept in factors."""
    return parts(layer) if layer.layout == FACTORED else (layer,)


@lru_cache(maxsize=256)
def _tied_parts(layer: Layer) -> tuple[Layer, Layer]:
    table = replace(
        layer,
        name=f"{layer.name} (table)",
        kind="embedding",
        input_width=layer.output_width,
        output_width=layer.input_width,
        positions=layer.looked_up,
        looked_up=None,
    )
    return replace(layer, kind="linear", looked_up=None), table
