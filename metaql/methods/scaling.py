"""Brings features to a common scale by numbers that few polluted rows can't move."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaql.methods.rows import in_parts, usual_network

# The distance between a normal distribution's quartiles, in standard deviations.
QUARTILES = 1.349
# Up to here values are kept as they are; beyond, they grow logarithmically, so that none drowns the others.
STRAIGHT = 5.0
# As many values as are looked at of each feature, channel or image, which bounds time and memory.
SAMPLED = 100_000
# As many values of a row as are read at a time: one after the other, each would fetch every row's memory again.
TOGETHER = 16


@dataclass(frozen=True)
class Scaling:
    """Median and deviation, to be broadcast over rows: of each feature or channel, or of all values."""

    centre: Tensor
    deviation: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """float32, of the same shape; a feature that was constant becomes 0."""
        return in_parts(self._scaled, features)

    def _scaled(self, features: Tensor) -> Tensor:
        scaled = (features.to(torch.float64) - self.centre) / self.deviation
        size = scaled.abs()
        bent = scaled.sign() * (STRAIGHT + (size - STRAIGHT).clamp(min=0).log1p())
        return torch.where(size > STRAIGHT, bent, scaled).to(torch.float32)


def scaling_of(features: Tensor, channels: bool) -> Scaling:
    """What scales rows [n, d, …] of finite numbers: each of d alone, or with ``channels`` False all values alike."""
    groups = features.shape[1] if channels else 1
    columns = features.reshape(len(features), groups, -1)
    blocks = columns.split(max(1, TOGETHER // columns.shape[2]), 1)
    found = [_of_values(_some(values)) for block in blocks for values in block.transpose(0, 1).flatten(1)]
    centre, deviation = torch.tensor(found, dtype=torch.float64, device=features.device).T
    shape = [groups, *[1] * (features.ndim - 2)]
    return Scaling(centre.reshape(shape), deviation.reshape(shape))


def usual_scaling(features: Tensor) -> Scaling:
    """What scales rows [n, *shape] by what they are: an image of one colour as a whole, all else by its first axis."""
    shape = tuple(features.shape[1:])
    return scaling_of(features, channels=len(shape) != 2 or usual_network(shape) != "conv2d")


def _some(values: Tensor) -> Tensor:
    """The values, or if they are many some drawn at random: a fixed stride could meet the same pixel of each image."""
    if len(values) > SAMPLED:
        places = torch.randint(len(values), (SAMPLED,), generator=torch.Generator().manual_seed(0))
        values = values[places.to(values.device)]
    return values.to(torch.float64)


def _of_values(values: Tensor) -> tuple[float, float]:
    low, centre, high = (float(each) for each in _quartiles(values))
    spread = (high - low) / QUARTILES
    if spread == 0:
        # Most values are the same, as in a column of counts: the others say what is large.
        spread = float(values.sub(centre).square().mean().sqrt())
    return centre, spread if spread > 0 else float("inf")


def _quartiles(values: Tensor) -> Tensor:
    ordered = values.sort().values
    places = torch.tensor([0.25, 0.5, 0.75]) * (len(ordered) - 1)
    return ordered[places.round().long()]
