"""Networks that embed rows, and the generator that makes rows up.

Element-wise dropout does more for few labels than any other choice here: dropping whole channels, as is usual for
convolutions, leaves too much of a series or an image untouched.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.networks import Build, Networks
from metaql.methods.rows import Shape, in_parts, usual_network

DIMENSIONS = 64
INPUT_DROPOUT, DROPOUT = 0.2, 0.5
CHANNELS = (32, 48, 64, 64, 64, 64)
# Strides go on until no side is longer.
LEFT = 8
NOISE = 64


def dropped(values: Tensor, share: float, training: bool) -> Tensor:
    """Values of which ``share``, to a 256th, are 0 at random and the others grown to keep the mean, when training.

    As ``F.dropout``, which draws a number for each value and took a third of the training: here one lasts for eight.
    """
    if not training:
        return values
    of_256 = round(share * 256)
    drawn = torch.empty(-(-values.numel() // 8), dtype=torch.int64).random_(-(2**63), None)
    kept = (drawn.view(torch.uint8)[: values.numel()] >= of_256).reshape(values.shape)
    return values * (kept.to(values) * (256 / (256 - of_256)))


class MLP(nn.Module):
    """[n, …] to [n, DIMENSIONS], by two hidden layers."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise((inputs, 256, 128, DIMENSIONS)))

    def forward(self, rows: Tensor) -> Tensor:
        points = dropped(rows.flatten(1), INPUT_DROPOUT, self.training)
        for layer in self.layers[:-1]:
            points = dropped(F.leaky_relu(layer(points), 0.2), DROPOUT, self.training)
        return F.leaky_relu(self.layers[-1](points), 0.2)


class Convolutions(nn.Module):
    """[n, channels, length] or [n, channels, h, w] to [n, DIMENSIONS], by strides of 2 until little is left."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sides = [shape[1:]]
        while (max(sides[-1]) > LEFT and len(sides) <= len(CHANNELS)) or len(sides) == 1:
            sides.append(tuple(-(-side // 2) for side in sides[-1]))
        sizes = (shape[0], *CHANNELS[: len(sides) - 1])
        convolution = nn.Conv1d if len(shape) == 2 else nn.Conv2d
        self.convolutions = nn.ModuleList(convolution(a, b, 5, stride=2, padding=2) for a, b in pairwise(sizes))
        # When something happens in a series says little, and where something is in an image says much.
        self.pooled = len(shape) == 2
        self.linear = nn.Linear(sizes[-1] * (1 if self.pooled else torch.Size(sides[-1]).numel()), DIMENSIONS)

    def forward(self, rows: Tensor) -> Tensor:
        rows = dropped(rows, INPUT_DROPOUT, self.training)
        for convolution in self.convolutions:
            rows = dropped(F.leaky_relu(convolution(rows), 0.2), DROPOUT, self.training)
        flat = rows.mean(2) if self.pooled else rows.flatten(1)
        return F.leaky_relu(self.linear(flat), 0.2)


class Generator(nn.Module):
    """Rows [n, *shape] made up from noise: whatever their shape, two hidden layers with batch norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sizes = (NOISE, 256, 256)
        self.hidden = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))
        self.norms = nn.ModuleList(nn.BatchNorm1d(size) for size in sizes[1:])
        self.output = nn.Linear(sizes[-1], torch.Size(shape).numel())
        self.shape = shape

    def forward(self, count: int) -> Tensor:
        rows = torch.randn(count, NOISE).to(self.output.weight)
        for layer, norm in zip(self.hidden, self.norms, strict=True):
            rows = F.softplus(norm(layer(rows)))
        made: Tensor = self.output(rows).unflatten(1, self.shape)
        return made


NETWORKS = Networks("lancet", lambda shape: MLP(torch.Size(shape).numel()), Convolutions)


def register_network(name: str, build: Build) -> None:
    """Makes ``network='name'`` known; ``build(shape)`` returns a module that maps scaled rows [n, *shape] to [n, d]."""
    NETWORKS.register(name, build)


def build_network(name: str | None, shape: Shape) -> tuple[nn.Module, int]:
    """A network for rows of this shape with fresh weights, and how many dimensions its points have."""
    name = name or usual_network(shape)
    module = NETWORKS.build(name, shape)
    points = in_parts(module, torch.zeros(2, *shape))
    if points.ndim != 2 or len(points) != 2:
        raise QueryError(f"network '{name}' must map rows [n, …] to points [n, d], not to {list(points.shape)}")
    return module, points.shape[1]
