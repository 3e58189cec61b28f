"""Detectors: a module and a score of its inputs, which is larger for what is more anomalous."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.elite.networks import NETWORKS, build_decoder
from metaql.methods.elite.settings import WITHOUT_META_GRADIENTS, Settings
from metaql.methods.rows import Shape, in_parts, usual_network

# No coordinate of the centre is nearer to 0, where a network without biases could bring everything by zero weights.
LEAST_COORDINATE = 0.1
# Under the root of a distance, whose slope is infinite at 0.
SMALLEST = 1e-12


class SVDD(nn.Module):
    """Deep SVDD: rows are mapped to points, and scored by the distance to a fixed ``centre``."""

    centre: Tensor

    def __init__(self, network: nn.Module, points: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("centre", torch.zeros(points))

    def forward(self, rows: Tensor) -> Tensor:
        points: Tensor = self.network(rows)
        return points

    def score(self, rows: Tensor) -> Tensor:
        return _length(self(rows) - self.centre)

    def prepare(self, rows: Tensor) -> None:
        """Puts the centre into the mean of the rows' first points, and away from 0 in every coordinate."""
        centre = in_parts(self, rows).mean(0)
        away = torch.where(centre < 0, -LEAST_COORDINATE, LEAST_COORDINATE)
        self.centre.copy_(torch.where(centre.abs() < LEAST_COORDINATE, away, centre))


class Autoencoder(nn.Module):
    """Rows are mapped to points and back, and scored by how far from where they were they come out."""

    def __init__(self, network: nn.Module, points: int, shape: Shape) -> None:
        super().__init__()
        self.network = network
        self.decoder = build_decoder(network, points, shape)

    def forward(self, rows: Tensor) -> Tensor:
        points: Tensor = self.network(rows)
        return points

    def score(self, rows: Tensor) -> Tensor:
        wrong: Tensor = (self.decoder(self.network(rows)) - rows).flatten(1)
        return _length(wrong / wrong.shape[1] ** 0.5)


def _length(vectors: Tensor) -> Tensor:
    squares: Tensor = vectors.square().sum(1)
    return (squares + SMALLEST).sqrt()


@dataclass(frozen=True)
class Detector:
    """How a detector is made for rows of a shape, and how its module scores rows."""

    build: Callable[[Shape, str | None], nn.Module]
    score: Callable[[nn.Module, Tensor], Tensor]


def _with_network(kind: Callable[[nn.Module, int, Shape], nn.Module]) -> Callable[[Shape, str | None], nn.Module]:
    def build(shape: Shape, network: str | None) -> nn.Module:
        name = network or usual_network(shape)
        encoder = NETWORKS.build(name, shape)
        points = in_parts(encoder, torch.zeros(2, *shape))
        if points.ndim != 2 or len(points) != 2:
            raise QueryError(f"network '{name}' must map rows [n, …] to points [n, d], not to {list(points.shape)}")
        return kind(encoder, points.shape[1], shape)

    return build


def _own_score(module: nn.Module, rows: Tensor) -> Tensor:
    assert isinstance(module, (SVDD, Autoencoder))
    return module.score(rows)


_SVDD = Detector(_with_network(lambda network, points, _: SVDD(network, points)), _own_score)
_DETECTORS = {
    "svdd": _SVDD,
    "autoencoder": Detector(_with_network(Autoencoder), _own_score),
    **dict.fromkeys(WITHOUT_META_GRADIENTS, _SVDD),
}
OWN = tuple(_DETECTORS)


def register_detector(
    name: str, build: Callable[[Shape], nn.Module], score: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """Makes ``detector='name'`` known.

    ``build(shape)`` returns the module, ``score(module, rows)`` the scores [n] of rows [n, *shape], which are scaled:
    larger for what is more anomalous, differentiable, and negative if need be, as log-likelihoods are.
    """
    if name in OWN:
        raise QueryError(f"'{name}' is the name of a detector that is there already: choose another")
    _DETECTORS[name] = Detector(lambda shape, _: build(shape), lambda module, rows: _single(score(module, rows)))


def _single(scores: Tensor) -> Tensor:
    """Scores as float32, in which they are weighed; whatever is no scores is refused by who looks at it."""
    return scores.float() if isinstance(scores, Tensor) and scores.is_floating_point() else scores


def find_detector(settings: Settings) -> Detector:
    """The detector that the settings name; QueryError if nobody has registered it."""
    name = settings.detector
    if name not in _DETECTORS:
        raise QueryError(
            f"there is no detector '{name}', only {', '.join(_DETECTORS)}. Detectors of your own are made known by "
            f"metaql.methods.elite.register_detector('{name}', build, score)"
        )
    if name not in OWN and settings.network is not None:
        raise QueryError(f"detector '{name}' brings a network of its own: leave out network")
    return _DETECTORS[name]
