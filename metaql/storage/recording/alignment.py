"""Where the samples are in the leading dimensions of an operation's input.

Most models keep samples in the first dimension. Some keep time there, and some flatten samples and
positions into one, in either order. Which it is can't be told from a shape alone, but the gradient of one
sample's loss can tell: it is zero at every position of another sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

# Gradient outside a sample's own positions, relative to all of it, that is still rounding.
LEAK = 1e-6


@dataclass(frozen=True)
class Alignment:
    """Samples lie along ``axis``; ``samples_first`` says how they are interleaved with positions there."""

    axis: int
    samples_first: bool = True

    def apply(self, values: Tensor, leading: int, samples: int) -> Tensor:
        """values [*leading, ...] => [samples, positions, ...]."""
        length = values.shape[self.axis] // samples
        split = (samples, length) if self.samples_first else (length, samples)
        moved: Tensor = values.unflatten(self.axis, split).movedim(self.axis + (not self.samples_first), 0)
        return moved.flatten(1, leading)

    def mask(self, shape: tuple[int, ...], samples: int, sample: int) -> Tensor:
        """Bool [*shape], true at the leading positions that belong to the sample."""
        numbers = torch.arange(prod(shape)).reshape(shape)
        own = self.apply(numbers, len(shape), samples)[sample]
        return torch.isin(numbers, own)


def candidates(shape: Sequence[int], samples: int) -> list[Alignment]:
    """Every way in which so many samples can lie in these leading dimensions, likeliest first."""
    if samples == 1:
        return [Alignment(0)] if len(shape) else []
    exact = [Alignment(axis) for axis, size in enumerate(shape) if size == samples]
    if exact:
        return exact
    return [
        Alignment(axis, samples_first)
        for axis, size in enumerate(shape)
        if size and size % samples == 0
        for samples_first in (True, False)
    ]


def align(
    shapes: Sequence[tuple[int, ...]],
    samples: int,
    gradients_of: Callable[[int], Sequence[Tensor | None]],
    probes: Sequence[int],
) -> list[Alignment | None]:
    """The alignment of each operation from its leading shape; None where no way is consistent.

    ``gradients_of(k)`` gives dC_k/dy of sample k's own loss for every operation. It is called for the
    ``probes`` alone, and only where a shape leaves a choice.
    """
    remaining = [candidates(shape, samples) for shape in shapes]
    if any(len(ways) > 1 for ways in remaining):
        for probe in probes:
            for place, (shape, dy) in enumerate(zip(shapes, gradients_of(probe), strict=True)):
                ways = remaining[place]
                if dy is not None:
                    remaining[place] = [way for way in ways if owns(way, dy, shape, samples, probe)]
    return [ways[0] if ways else None for ways in remaining]


def align_backwards(
    shapes: Sequence[tuple[int, ...]],
    samples: int,
    gradients_from: Callable[[int, Tensor], Sequence[Tensor | None]],
    probes: Sequence[int],
    mixing: bool,
) -> list[Alignment | None]:
    """The alignment of each operation when the samples' own losses are out of reach.

    ``gradients_from(k, mask)`` gives dC/dy of every operation for a C that depends on the output of operation k at
    the masked leading positions alone. A later operation's guess is right if what it reaches in the earlier ones
    are positions of the same sample there. Where the model is known to be ``mixing`` samples (batch norm in training
    mode) every guess looks wrong; then the first dimension, with exactly the samples in it, is trusted.
    """
    if not any(samples in shape for shape in shapes):
        # Any number that divides the batch would look like samples of several positions.
        return [None] * len(shapes)
    remaining = [candidates(shape, samples) for shape in shapes]
    # What no sample has a place in, such as a table of distances, is out of reach, and says nothing about others.
    reached = {place for place, ways in enumerate(remaining) if not ways}
    for anchor in reversed(range(len(shapes))):
        if anchor in reached:
            continue
        # Of two dimensions that both have the samples' number nothing here tells positions from samples for sure.
        ways = remaining[anchor][:1] if shapes[anchor].count(samples) > 1 else remaining[anchor]
        below: set[int] = set()
        for way in ways:
            narrowed = _narrow(remaining, shapes, samples, anchor, way, gradients_from, probes, below)
            if narrowed is not None:
                remaining = narrowed
                break
        else:
            for place in (anchor, *below):
                plain = [way for way in remaining[place] if _is_plain(way, shapes[place], samples)]
                remaining[place] = plain if mixing else []
        reached |= below
    return [ways[0] if ways else None for ways in remaining]


def _narrow(
    remaining: Sequence[list[Alignment]],
    shapes: Sequence[tuple[int, ...]],
    samples: int,
    anchor: int,
    way: Alignment,
    gradients_from: Callable[[int, Tensor], Sequence[Tensor | None]],
    probes: Sequence[int],
    reached: set[int],
) -> list[list[Alignment]] | None:
    """What is left of every operation's ways if ``way`` is the anchor's; None if some operation has none left.

    Operations that the anchor depends on are added to ``reached``.
    """
    narrowed = [list(ways) for ways in remaining]
    narrowed[anchor] = [way]
    for probe in probes:
        dys = gradients_from(anchor, way.mask(shapes[anchor], samples, probe))
        for place, (shape, dy) in enumerate(zip(shapes, dys, strict=True)):
            if dy is not None and place != anchor and candidates(shape, samples):
                reached.add(place)
                narrowed[place] = [each for each in narrowed[place] if owns(each, dy, shape, samples, probe)]
    return narrowed if all(narrowed[place] for place in (*reached, anchor)) else None


def _is_plain(way: Alignment, shape: tuple[int, ...], samples: int) -> bool:
    return way.axis == 0 and shape[0] == samples


def owns(way: Alignment, dy: Tensor, shape: tuple[int, ...], samples: int, sample: int) -> bool:
    """Whether all of dy lies at the positions that this alignment gives to the sample."""
    total = dy.abs().sum()
    own = way.apply(dy, len(shape), samples)[sample].abs().sum()
    return bool(total - own <= LEAK * total)


def probes(samples: int) -> list[int]:
    """Up to three samples that stand for a batch: the first, one in the middle and the last."""
    return sorted({0, samples // 2, samples - 1})
