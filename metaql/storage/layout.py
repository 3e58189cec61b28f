"""Which layout a layer is kept in: its factors or its gradient, by the number of elements a sample needs.

A factored sample costs S·(D_in + D_out) elements, a full one D_in·D_out. A convolution's suffix can also be
kept as the input it slides over, which is smaller than its patches by about the size of the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from metaql.storage.schema import FACTORED, FULL, Layer, Unfold


@dataclass(frozen=True)
class Size:
    """Elements that one sample of a layer needs in each layout; None where the layout does not exist."""

    full: int
    factored: float | None
    unfolded_later: float | None


def size(layer: Layer, positions: float, geometry: Unfold | None) -> Size:
    """The elements a sample with so many positions needs, in each layout."""
    if layer.input_width is None or layer.output_width is None:
        return Size(layer.width, None, None)
    suffix = 1 if layer.kind == "embedding" else layer.groups * layer.input_width
    factored = positions * (suffix + layer.output_width)
    if layer.looked_up is not None:
        factored += layer.looked_up * (1 + layer.input_width)
    later = prod(geometry.input_shape) + positions * layer.output_width if geometry else None
    return Size(layer.width, factored, later)


def choose(layer: Layer, positions: float, geometry: Unfold | None = None) -> Layer:
    """The layer with its ``layout`` and ``unfold`` set to the smallest; factors win a tie."""
    sizes = size(layer, positions, geometry)
    if sizes.factored is None:
        return replace(layer, layout=FULL)
    if sizes.unfolded_later is not None and sizes.unfolded_later < min(sizes.factored, sizes.full):
        return replace(layer, layout=FACTORED, unfold=geometry)
    return replace(layer, layout=FACTORED if sizes.factored <= sizes.full else FULL)
