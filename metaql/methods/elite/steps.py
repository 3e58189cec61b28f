"""What one mini-batch says: scores, meta-gradients, and the gradient of the step to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from metaql.methods.elite.factored import FactoredPass, along, gradient
from metaql.methods.elite.forward_mode import Score, along_forward
from metaql.methods.elite.meta_gradients import kept_buffers, products_from_factors, trainable, why_not_factored

# What the gradient of the labelled rows' own loss counts for, beside the weighted batch.
MIX = 1.0
Weigh = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Labels:
    """Labelled rows [m, …] with is_anomaly bool [m], and the margin C beyond which an anomaly costs nothing.

    L_v = Σ ``shares`` · (Ω of normals, max(C - Ω, 0) of anomalies), Eq. 4 with each class weighted by a half.
    """

    rows: Tensor
    is_anomaly: Tensor
    margin: float
    shares: Tensor

    @classmethod
    def of(cls, rows: Tensor, is_anomaly: Tensor, margin: float) -> Labels:
        anomalies = int(is_anomaly.sum())
        shares = torch.where(is_anomaly, 0.5 / max(anomalies, 1), 0.5 / max(len(rows) - anomalies, 1))
        return cls(rows, is_anomaly, margin, shares.to(rows))

    def loss(self, scores: Tensor) -> Tensor:
        return torch.where(self.is_anomaly, (self.margin - scores).clamp(min=0), scores) @ self.shares

    def slopes(self, scores: Tensor) -> Tensor:
        """∂L_v/∂Ω of each row."""
        return torch.where(self.is_anomaly, -(scores < self.margin).to(scores), 1) * self.shares

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
    """For a batch: the weights used [n], the labelled rows' loss, its gradient G, and the gradient to step along."""

    weights: Tensor
    validation_loss: Tensor
    direction: dict[str, Tensor]
    gradient: dict[str, Tensor]


class Steps(Protocol):
    """Makes a step of a batch and the labelled rows, and products alone for many rows.

    ``weigh`` makes weights of ⟨∇Ω_i, G⟩ and the labelled rows' loss.
    """

    def step(self, batch: Tensor, labels: Labels, weigh: Weigh) -> Step: ...
    def products(self, rows: Tensor, direction: dict[str, Tensor]) -> Tensor: ...


def of_size_one(values: Tensor) -> Tensor:
    """The values divided by their mean size, so that no scale has to be tuned for a data set."""
    return values / values.abs().mean().clamp(min=torch.finfo(values.dtype).tiny)


def pushing_weights(weights: Tensor, scores: Tensor, margin: float) -> Tensor:
    """The weights, with 0 for pseudo anomalies beyond the margin: nothing pushes them further, as in Eq. 4."""
    return weights * ((weights > 0) | (scores < margin))


def mixed(weighted: dict[str, Tensor], direction: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weighted gradient with the labelled rows' own added."""
    total = dict(weighted)
    for name, value in direction.items():
        total[name] = total[name].add(value, alpha=MIX) if name in total else value * MIX
    return total


class FactoredSteps:
    """One pass over batch and labelled rows together, since rows don't mix."""

    def __init__(self, module: nn.Module, score: Score) -> None:
        self._score: Callable[[Tensor], Tensor] = lambda rows: score(module, rows)
        self._parameters = trainable(module)

    def step(self, batch: Tensor, labels: Labels, weigh: Weigh) -> Step:
        sizes = [len(batch), len(labels.rows)]
        taken = FactoredPass(self._score, self._parameters, torch.cat([batch, labels.rows]))
        scores, known = taken.scores.split(sizes)
        own, labelled = taken.backward(torch.cat([torch.ones_like(scores), labels.slopes(known)]), sizes)
        direction = gradient(labelled)
        loss = labels.loss(known)
        weights = weigh(along(own, direction, scores), loss)
        pushing = pushing_weights(weights, scores, labels.margin) / len(batch)
        total = mixed(gradient(own, pushing), direction)
        return Step(weights, loss, direction, total)

    def products(self, rows: Tensor, direction: dict[str, Tensor]) -> Tensor:
        return products_from_factors(self._score, self._parameters, rows, direction)


class ForwardSteps:
    """The labelled rows' gradient first; then scores and products of the batch by dual numbers, and one backward pass.

    The running statistics of norms see the batch alone.
    """

    def __init__(self, module: nn.Module, score: Score) -> None:
        self._module, self._score = module, score
        self._parameters = trainable(module)

    def step(self, batch: Tensor, labels: Labels, weigh: Weigh) -> Step:
        with kept_buffers(self._module):
            loss = labels.loss(self._score(self._module, labels.rows))
            direction = self._gradient(loss)
        scores, products = along_forward(self._module, self._score, batch, direction)
        weights = weigh(products, loss.detach())
        pushing = pushing_weights(weights, scores.detach(), labels.margin)
        total = mixed(self._gradient((scores * pushing).mean()), direction)
        return Step(weights, loss.detach(), direction, total)

    def products(self, rows: Tensor, direction: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return along_forward(self._module, self._score, rows, direction)[1]

    def _gradient(self, loss: Tensor) -> dict[str, Tensor]:
        return gradient_of(loss, self._parameters)


def gradient_of(loss: Tensor, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The gradient by parameter; those that took no part are left out."""
    if not loss.requires_grad:
        return {}
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: each for name, each in zip(parameters, found, strict=True) if each is not None}


def steps_for(module: nn.Module, score: Score, rows: Tensor) -> Steps:
    """Factored steps where these rows show that they are exact, else those by forward mode."""
    if why_not_factored(module, score, rows) is None:
        return FactoredSteps(module, score)
    return ForwardSteps(module, score)
