"""Blocks cut, padded and moved, without touching what they mean.

Every block in ``udfs`` is unfolded: its suffix has one row a position, whatever the store keeps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from metaql.storage.blocks import Block, Factored, Factors, Full, Tied, owners
from metaql.storage.schema import Layer

# Intermediate results of a kernel are kept near the processor's caches; larger ones were slower throughout.
BUDGET = 2 << 20


def steps(count: int, elements: float, budget: int = BUDGET) -> Iterator[slice]:
    """Slices of ``count`` rows that need at most ``budget`` bytes each, at so many 4-byte elements a row."""
    size = max(1, int(budget // max(4 * elements, 1)))
    for begin in range(0, count, size):
        yield slice(begin, min(begin + size, count))


def take(block: Block, samples: Tensor) -> Block:
    """The samples at these places, in this order, repeated as often as they are named."""
    if isinstance(block, Full):
        return Full(block.gradient[samples])
    return block.each(lambda one: _take(one, samples))


def _take(block: Factored, samples: Tensor) -> Factored:
    if block.offsets is None:
        each = block.prefix.shape[0] // max(block.samples, 1)
        suffix = block.suffix.reshape(block.samples, each, *block.suffix.shape[1:])[samples]
        prefix = block.prefix.reshape(block.samples, each, *block.prefix.shape[1:])[samples]
        return Factored(suffix.flatten(0, 1), prefix.flatten(0, 1), len(samples))
    lengths = block.offsets.diff()[samples]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    total = int(offsets[-1])
    begins = (block.offsets[:-1][samples] - offsets[:-1]).repeat_interleave(lengths)
    positions = torch.arange(total, device=block.prefix.device) + begins
    return Factored(block.suffix[positions], block.prefix[positions], len(samples), offsets)


def row_dots(left: Tensor, right: Tensor) -> Tensor:
    """Each row with the row beside it: [n, i], [n, i] => [n]."""
    # torch makes all products before it adds them up: a few at a time, they stay in the caches.
    parts = [torch.linalg.vecdot(left[part], right[part]) for part in steps(len(left), left.shape[1])]
    return joined(parts, left.new_zeros(0))


def by_group(values: Tensor, groups: int) -> Tensor:
    """[p, g·i] => [p, g, i]."""
    return values.reshape(values.shape[0], groups, values.shape[1] // groups)


def single(block: Factored) -> bool:
    """Whether every sample has one position, so that there is nothing to sum."""
    return block.offsets is None and block.prefix.shape[0] == block.samples


def joined(parts: list[Tensor], empty: Tensor) -> Tensor:
    """The parts one after another, or ``empty`` when there are none."""
    if not parts:
        return empty
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def summed(parts: list[Tensor]) -> Tensor:
    """The sum of some tensors; one as it is."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def numbers(block: Block) -> Tensor:
    """A tensor of the block's, for its type and device."""
    if isinstance(block, Full):
        return block.gradient
    return (block.projection if isinstance(block, Tied) else block).prefix


def positions(block: Factors) -> float:
    """The average number of positions of a sample; of a tied layer's projection."""
    if isinstance(block, Tied):
        block = block.projection
    return block.prefix.shape[0] / max(block.samples, 1)


def longest(block: Factored) -> int:
    """The largest number of positions of a sample."""
    if block.offsets is None:
        return block.prefix.shape[0] // max(block.samples, 1)
    return int(block.offsets.diff().max()) if block.samples else 0


def padded(block: Factored) -> Factored:
    """All samples as long as the longest, filled up with zero prefixes, which add nothing."""
    if block.offsets is None:
        return block
    length, owner = longest(block), owners(block)
    place = torch.arange(len(owner), device=owner.device) - block.offsets[owner] + owner * length
    suffix = block.suffix.new_zeros(block.samples * length, *block.suffix.shape[1:])
    prefix = block.prefix.new_zeros(block.samples * length, *block.prefix.shape[1:])
    suffix[place], prefix[place] = block.suffix, block.prefix
    return Factored(suffix, prefix, block.samples)


def move(block: Block, device: torch.device, dtype: torch.dtype | None = None) -> Block:
    """The block on a device and in a dtype; row numbers of an embedding stay integers."""
    if isinstance(block, Full):
        return Full(block.gradient.to(device, dtype))
    return block.each(lambda one: _move(one, device, dtype))


def _move(block: Factored, device: torch.device, dtype: torch.dtype | None) -> Factored:
    whole = not block.suffix.is_floating_point()
    suffix = block.suffix.to(device, None if whole else dtype)
    offsets = None if block.offsets is None else block.offsets.to(device)
    return replace(block, suffix=suffix, prefix=block.prefix.to(device, dtype), offsets=offsets)


def columns(layer: Layer, places: tuple[int, ...], gradient: Tensor) -> Tensor:
    """Of laid-out gradients [n, layer.width], the columns of some parameters, in the order of ``places``."""
    if places == tuple(range(len(layer.parameters))):
        return gradient
    begins = [0]
    for parameter in layer.parameters:
        begins.append(begins[-1] + parameter.width)
    parts = [gradient[:, begins[place] : begins[place + 1]] for place in places]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
