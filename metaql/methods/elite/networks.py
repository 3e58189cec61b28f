"""Networks that map rows to points, without biases and with norms that have no parameters.

A bias could bring every row to one point, and batch norm would let the few labelled rows move the statistics of all.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaql.methods.networks import Build, Networks, OneChannel
from metaql.methods.rows import Shape

DIMENSIONS = 32
# Pooling goes on until no side is longer.
POOLED = 8
CHANNELS = (16, 32, 32, 32, 32, 32, 32, 32)


class MLP(nn.Module):
    """[n, …] to [n, ``outputs``], by two hidden layers.

    A constant beside the features is all the bias there is, so that the size of a row counts and not its direction
    alone; a norm would take the size away, which for measurements is what anomalies are made of.
    """

    def __init__(self, inputs: int, outputs: int, hidden: tuple[int, ...] = (128, 64)) -> None:
        super().__init__()
        sizes = (inputs + 1, *hidden, outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes))

    def forward(self, rows: Tensor) -> Tensor:
        points = torch.constant_pad_nd(rows.flatten(1), (0, 1), 1.0)
        for place, layer in enumerate(self.layers):
            points = layer(points if place == 0 else F.leaky_relu(points, 0.1))
        return points


class Convolutions(nn.Module):
    """[n, channels, length] or [n, channels, h, w] to [n, DIMENSIONS]: convolve, norm, pool, until little is left."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.sides = [shape[1:]]
        while max(self.sides[-1]) > POOLED or len(self.sides) == 1:
            self.sides.append(tuple(-(-side // 2) for side in self.sides[-1]))
        convolution = nn.Conv1d if len(shape) == 2 else nn.Conv2d
        sizes = (shape[0], *CHANNELS[: len(self.sides) - 1])
        self.convolutions = nn.ModuleList(convolution(a, b, 5, padding=2, bias=False) for a, b in pairwise(sizes))
        flat = sizes[-1] * torch.Size(self.sides[-1]).numel()
        self.linear = nn.Linear(flat, DIMENSIONS, bias=False)
        self.channels = sizes

    def forward(self, rows: Tensor) -> Tensor:
        pool = F.max_pool1d if rows.ndim == 3 else F.max_pool2d
        for convolution in self.convolutions:
            rows = F.leaky_relu(pool(F.group_norm(convolution(rows), 1), 2, ceil_mode=True), 0.1)
        points: Tensor = self.linear(rows.flatten(1))
        return points


class Deconvolutions(nn.Module):
    """[n, DIMENSIONS] to [n, *shape], the way back of ``Convolutions``."""

    def __init__(self, encoder: Convolutions) -> None:
        super().__init__()
        self.sides = encoder.sides[::-1]
        sizes = encoder.channels[::-1]
        self.start = (sizes[0], *self.sides[0])
        self.linear = nn.Linear(DIMENSIONS, torch.Size(self.start).numel(), bias=False)
        convolution = type(encoder.convolutions[0])
        self.convolutions = nn.ModuleList(convolution(a, b, 5, padding=2, bias=False) for a, b in pairwise(sizes))

    def forward(self, points: Tensor) -> Tensor:
        rows: Tensor = self.linear(points).unflatten(1, self.start)
        for convolution, side in zip(self.convolutions, self.sides[1:], strict=True):
            rows = F.leaky_relu(F.group_norm(rows, 1), 0.1)
            rows = convolution(F.interpolate(rows, size=side))
        return rows


def _mlp(shape: Shape) -> nn.Module:
    return MLP(torch.Size(shape).numel(), DIMENSIONS)


NETWORKS = Networks("elite", _mlp, Convolutions)


def register_network(name: str, build: Build) -> None:
    """Makes ``network='name'`` known; ``build(shape)`` returns a module that maps [n, *shape] to [n, d].

    Batch norm and biases are allowed, though a bias in the last layers invites collapse.
    """
    NETWORKS.register(name, build)


def build_decoder(network: nn.Module, points: int, shape: Shape) -> nn.Module:
    """A network from points [n, d] back to rows [n, *shape]."""
    encoder = network.network if isinstance(network, OneChannel) else network
    decoder = Deconvolutions(encoder) if isinstance(encoder, Convolutions) else None
    flat = decoder or MLP(points, torch.Size(shape).numel(), (64, 128))
    return nn.Sequential(flat, nn.Flatten(), nn.Unflatten(1, shape))
