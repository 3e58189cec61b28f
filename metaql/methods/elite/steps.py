"""What one mini-batch says: scores, meta-gradients, and the gradient of the step to take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from metaql.methods.elite.detectors import SVDD, Autoencoder
from metaql.methods.elite.factored import FactoredPass, NoFactorsError, along, gradient
from metaql.methods.elite.forward_mode import Score, along_forward
from metaql.methods.elite.meta_gradients import (
    Along,
    how_along,
    kept_buffers,
    products_from_factors,
    trainable,
    why_not_factored,
)

Weigh = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Labels:
    """Labelled rows [m, …] with is_anomaly bool [m], and the margin C beyond which an anomaly costs nothing.

    L_v = ½ mean of Ω over normals + ½ mean of max(C - Ω, 0) over anomalies (Eq. 4, each class weighing a half). It is
    Σ slope · (Ω - offset), with slopes that are 0 from ``cap`` on.
    """

    rows: Tensor
    is_anomaly: Tensor
    margin: float
    shares: Tensor
    cap: Tensor
    offset: Tensor

    @classmethod
    def of(cls, rows: Tensor, is_anomaly: Tensor, margin: float) -> Labels:
        anomalies = int(is_anomaly.sum())
        shares = torch.where(is_anomaly, -0.5 / max(anomalies, 1), 0.5 / max(len(rows) - anomalies, 1))
        cap, offset = (torch.where(is_anomaly, margin, other).to(rows) for other in (math.inf, 0.0))
        return cls(rows, is_anomaly, margin, shares.to(rows), cap, offset)

    def loss(self, scores: Tensor, slopes: Tensor | None = None) -> Tensor:
        return (self.slopes(scores.detach()) if slopes is None else slopes) @ (scores - self.offset)

    def slopes(self, scores: Tensor) -> Tensor:
        """∂L_v/∂Ω of each row."""
        return self.shares * (scores < self.cap)

    def drawn(self, most: int) -> Labels:
        """At most so many of them, of both classes alike as far as they go; all if they are no more."""
        if len(self.rows) <= most:
            return self
        normals, anomalies = (torch.nonzero(self.is_anomaly == each).flatten() for each in (False, True))
        # What one class leaves of its half is the other's.
        sizes = [max(most // 2, most - len(anomalies)), max(most // 2, most - len(normals))]
        pairs = zip((normals, anomalies), sizes, strict=True)
        taken = torch.cat([each[torch.randperm(len(each))[:size].to(each.device)] for each, size in pairs])
        return Labels.of(self.rows[taken], self.is_anomaly[taken], self.margin)


@dataclass(frozen=True)
class Step:
    """For a batch: the labelled rows' loss, its gradient G, and the gradient to step along."""

    validation_loss: float
    direction: dict[str, Tensor]
    gradient: dict[str, Tensor]


class Steps(Protocol):
    """Makes a step of a batch and the labelled rows, and products alone for many rows.

    ``weigh`` makes weights of ⟨∇Ω_i / n, G⟩ and how much the labelled rows have left to learn.
    """

    def step(self, batch: Tensor, labels: Labels, weigh: Weigh) -> Step: ...
    def products(self, rows: Tensor, direction: dict[str, Tensor]) -> Tensor: ...


def left_to_learn(loss: float, *scores: Tensor) -> float:
    """L_v, with normals' costs counted from the lowest score where some are negative, as log-likelihoods may be."""
    return loss - min(0.0, *(float(each.detach().amin()) for each in scores)) / 2


def pushing_weights(weights: Tensor, scores: Tensor, margin: float) -> Tensor:
    """The weights, with 0 for pseudo anomalies beyond the margin: nothing pushes them further, as in Eq. 4."""
    return torch.where(scores < margin, weights, weights.clamp(min=0))


def mixed(weighted: dict[str, Tensor], direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weighted gradient with the labelled rows' own added, in place: it costs nothing and leads the way."""
    for name, value in direction.items():
        if name in weighted:
            weighted[name].add_(value)
        else:
            weighted[name] = value
    return weighted


class FactoredSteps:
    """One pass over batch and labelled rows together, since rows don't mix.

    Rows that take another way through the module, where there are no factors, are left to ``UnfactoredSteps``.
    """

    def __init__(self, module: nn.Module, score: Score) -> None:
        self._module, self._module_score = module, score
        # Looking for negative scores costs two in a hundred of a small network's time.
        self._may_be_negative = not isinstance(module, (SVDD, Autoencoder))
        self._parameters = trainable(module)

    def step(self, batch: Tensor, labels: Labels, weigh: Weigh) -> Step:
        try:
            return self._step(batch, labels, weigh)
        except NoFactorsError:
            return self._otherwise(batch).step(batch, labels, weigh)

    def products(self, rows: Tensor, direction: dict[str, Tensor]) -> Tensor:
        try:
            return products_from_factors(self._score, self._parameters, rows, direction)
        except NoFactorsError:
            return self._otherwise(rows).products(rows, direction)

    def _otherwise(self, rows: Tensor) -> UnfactoredSteps:
        return UnfactoredSteps(self._module, self._module_score, how_along(self._module, self._module_score, rows))

    def _score(self, rows: Tensor) -> Tensor:
        return self._module_score(self._module, rows)

    def _step(self, batch: Tensor, labels: Labels, weigh: Weigh) -> Step:
        sizes = [len(batch), len(labels.rows)]
        taken = FactoredPass(self._score, self._parameters, torch.cat([batch, labels.rows]))
        scores, known = torch.split_with_sizes(taken.scores, sizes)
        slopes = labels.slopes(known)
        own, labelled = taken.backward(torch.cat([torch.full_like(scores, 1 / len(batch)), slopes]), sizes)
        direction = gradient(labelled)
        loss = float(labels.loss(known, slopes))
        left = left_to_learn(loss, taken.scores) if self._may_be_negative else loss
        pushing = pushing_weights(weigh(along(own, direction, scores), left), scores, labels.margin)
        total = mixed(gradient(own, pushing), direction)
        return Step(loss, direction, total)


class UnfactoredSteps:
    """The labelled rows' gradient first; then scores and products of the batch along it, and one backward pass.

    The running statistics of norms see the batch alone.
    """

    def __init__(self, module: nn.Module, score: Score, along: Along = along_forward) -> None:
        self._module, self._score, self._along = module, score, along
        self._parameters = trainable(module)

    def step(self, batch: Tensor, labels: Labels, weigh: Weigh) -> Step:
        with kept_buffers(self._module):
            known = self._score(self._module, labels.rows)
            total = labels.loss(known)
            direction, loss = self._gradient(total), float(total.detach())
        scores, products = self._along(self._module, self._score, batch, direction)
        left = left_to_learn(loss, scores, known)
        pushing = pushing_weights(weigh(products / len(batch), left), scores.detach(), labels.margin)
        return Step(loss, direction, mixed(self._gradient((scores * pushing).mean()), direction))

    def products(self, rows: Tensor, direction: dict[str, Tensor]) -> Tensor:
        return self._along(self._module, self._score, rows, direction)[1]

    def _gradient(self, loss: Tensor) -> dict[str, Tensor]:
        return gradient_of(loss, self._parameters)


def gradient_of(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient by parameter; those that took no part are left out."""
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: each for name, each in zip(parameters, found, strict=True) if each is not None}


def steps_for(module: nn.Module, score: Score, rows: Tensor) -> Steps:
    """Factored steps where these rows show that they are exact, else those that need no factors."""
    if why_not_factored(module, score, rows) is None:
        return FactoredSteps(module, score)
    return UnfactoredSteps(module, score, how_along(module, score, rows))
