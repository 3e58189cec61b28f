"""Gradients of a few samples in memory, factored or laid out in full, and the way from one to the other.

Letters: n samples, s positions, g groups, i one group's input width, o one group's output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from metaql.storage.schema import Layer, Unfold


@dataclass(frozen=True)
class Factored:
    """The prefixes and suffixes of ``samples`` samples, their positions one after another.

    ``prefix`` is [positions, g·o]. ``suffix`` is [positions, g·i]; for an embedding int64 [positions], the
    table's row at each; for a layer with ``unfold`` [n, elements], the convolution's own input, from which
    ``rows`` makes the positions. ``offsets`` (int64 [n + 1]) says where each sample's positions begin; None
    means that every sample has the same number.
    """

    suffix: Tensor
    prefix: Tensor
    samples: int
    offsets: Tensor | None = None


@dataclass(frozen=True)
class Full:
    """Laid-out gradients, [n, layer.width]: the weight flattened row-major, then the bias."""

    gradient: Tensor

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.gradient.shape[0]


Block = Factored | Full


def unfold(geometry: Unfold, inputs: Tensor, groups: int) -> Tensor:
    """The patches a convolution sees: inputs [n, channels, *spatial] => [n, s, g·i], in the order of its output."""
    pads = [amount for pair in reversed(geometry.padding) for amount in pair]
    patches = torch.nn.functional.pad(inputs, pads) if any(pads) else inputs
    dimensions = len(geometry.kernel)
    for axis, (size, stride, dilation) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ):
        patches = patches.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    n, channels = inputs.shape[:2]
    spatial = tuple(range(2, 2 + dimensions))
    kernel = tuple(range(2 + dimensions, 2 + 2 * dimensions))
    width = channels // groups * prod(geometry.kernel)
    return patches.permute(0, *spatial, 1, *kernel).reshape(n, -1, groups * width)


def rows(layer: Layer, block: Factored) -> Factored:
    """The block with one suffix row a position: unfolds a convolution's stored input, else changes nothing."""
    if layer.unfold is None:
        return block
    inputs = block.suffix.reshape(block.samples, *layer.unfold.input_shape)
    suffix = unfold(layer.unfold, inputs, layer.groups).flatten(0, 1)
    return Factored(suffix, block.prefix, block.samples, block.offsets)


def owners(block: Factored) -> Tensor:
    """Which sample each position belongs to, int64 [positions]."""
    samples = torch.arange(block.samples, device=block.prefix.device)
    if block.offsets is None:
        return samples.repeat_interleave(block.prefix.shape[0] // max(block.samples, 1))
    return samples.repeat_interleave(block.offsets.diff())


def lay_out(layer: Layer, block: Block) -> Tensor:
    """The gradients themselves, [n, layer.width]."""
    if isinstance(block, Full):
        return block.gradient
    block = rows(layer, block)
    weight = weight_gradient(layer.kind, block, layer.groups, layer.parameters[0].shape)
    if not layer.has_bias:
        return weight
    return torch.cat([weight, sum_by_sample(block, block.prefix)], dim=1)


def weight_gradient(kind: str, block: Factored, groups: int, shape: tuple[int, ...]) -> Tensor:
    """The gradient of a weight of this shape, flattened, [n, elements], from one suffix row a position."""
    if kind == "embedding":
        return _table_rows(block, shape[0])
    if kind == "norm":
        return sum_by_sample(block, block.prefix * block.suffix)
    if block.offsets is not None:
        pieces = [_outer(_piece(block, sample), groups) for sample in range(block.samples)]
        return torch.cat([block.prefix.new_zeros(0, prod(shape)), *pieces])
    return _outer(block, groups)


def sum_by_sample(block: Factored, values: Tensor) -> Tensor:
    """Values of each position summed within each sample: [positions, ...] => [n, ...]."""
    if block.offsets is None:
        return values.reshape(block.samples, -1, *values.shape[1:]).sum(1)
    total = values.new_zeros(block.samples, *values.shape[1:])
    return total.index_add_(0, owners(block), values)


def _outer(block: Factored, groups: int) -> Tensor:
    """Σ_s prefix_s suffix_sᵀ for each sample and group."""
    positions = block.prefix.shape[0] // block.samples
    suffix = block.suffix.reshape(block.samples, positions, groups, block.suffix.shape[1] // groups)
    prefix = block.prefix.reshape(block.samples, positions, groups, block.prefix.shape[1] // groups)
    return torch.einsum("nsgo,nsgi->ngoi", prefix, suffix).flatten(1)


def _piece(block: Factored, sample: int) -> Factored:
    assert block.offsets is not None
    own = slice(int(block.offsets[sample]), int(block.offsets[sample + 1]))
    return Factored(block.suffix[own], block.prefix[own], 1)


def _table_rows(block: Factored, table_rows: int) -> Tensor:
    """The gradient of an embedding's table: each prefix added to the row that its position looked up."""
    total = block.prefix.new_zeros(block.samples * table_rows, block.prefix.shape[1])
    total.index_add_(0, owners(block) * table_rows + block.suffix, block.prefix)
    return total.reshape(block.samples, -1)
