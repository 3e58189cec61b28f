"""HYDRA with the Hessian, by the letter: d(final weights)/d(weight of a sample), of every sample, for small models.

With ε added to a sample's weight of 1 in the sum of all samples' losses, the update of SGD with momentum

    v ← μ v + g(w, ε);    w ← w - η v    gives    v' ← μ v' + H w' + ∇ℓ_i / n [i in the batch];    w' ← w' - η v'

where w' and v' are the derivatives by ε, n is the size of the batch and H the Hessian of its mean loss. H w' is exact,
by differentiating twice; leaving it out is the paper's approximation. Everything is in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp, vmap
from torch.nn import functional as F

from bench.recorded_training import Training


class Differentiable:
    """A model's losses as functions of one vector of all parameters."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shapes = {name: each.shape for name, each in model.named_parameters()}

    def weights(self) -> Tensor:
        """The model's own, [parameters]."""
        return torch.cat([each.detach().flatten() for each in self.model.parameters()])

    def losses(self, weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Of each sample, [n]."""
        parts = weights.split([shape.numel() for shape in self.shapes.values()])
        values = {name: part.reshape(shape) for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)}
        return F.cross_entropy(functional_call(self.model, values, (inputs,)), labels, reduction="none")

    def gradients(self, weights: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
        """Of each sample's loss, [n, parameters]."""

        def one(values: Tensor, sample: Tensor, label: Tensor) -> Tensor:
            return self.losses(values, sample.unsqueeze(0), label.unsqueeze(0))[0]

        return vmap(grad(one), in_dims=(None, 0, 0))(weights, inputs, labels)

    def hessian_times(self, weights: Tensor, inputs: Tensor, labels: Tensor, vectors: Tensor) -> Tensor:
        """The Hessian of the mean loss times each row, [rows, parameters]."""
        mean = lambda values: self.losses(values, inputs, labels).mean()  # noqa: E731
        _, back = vjp(grad(mean), weights)
        return vmap(lambda vector: back(vector)[0])(vectors)


def derivatives(
    model: nn.Module, training: Training, inputs: Tensor, labels: Tensor, with_hessian: bool = True
) -> Tensor:
    """Trains the model; d(final weights)/dε of every sample, [samples, parameters]."""
    losses, weights = Differentiable(model), Differentiable(model).weights()
    velocity = torch.zeros_like(weights)
    of_weights = torch.zeros(len(labels), len(weights), dtype=weights.dtype)
    of_velocity = torch.zeros_like(of_weights)
    for ids in (each for epoch in training.batches(len(labels)) for each in epoch):
        batch = inputs[ids], labels[ids]
        gradients = losses.gradients(weights, *batch)
        of_velocity *= training.momentum
        if with_hessian:
            of_velocity += losses.hessian_times(weights, *batch, of_weights)
        of_velocity[ids] += gradients / len(ids)
        of_weights -= training.rate * of_velocity
        velocity = training.momentum * velocity + gradients.mean(0)
        weights = weights - training.rate * velocity
    nn.utils.vector_to_parameters(weights, model.parameters())
    return of_weights


def retrained(model: nn.Module, training: Training, inputs: Tensor, labels: Tensor, shares: Tensor) -> Tensor:
    """The final weights [models, parameters] of trainings in which samples weigh ``shares`` [models, samples], not 1.

    They start from the model's weights, and their batches are those of the training.
    """
    losses, start = Differentiable(model), Differentiable(model).weights()

    def mean(weights: Tensor, share: Tensor, batch: Tensor, targets: Tensor) -> Tensor:
        return (share * losses.losses(weights, batch, targets)).mean()

    slopes = vmap(grad(mean), in_dims=(0, 0, None, None))
    weights = start.repeat(len(shares), 1)
    velocity = torch.zeros_like(weights)
    for ids in (each for epoch in training.batches(len(labels)) for each in epoch):
        gradient = slopes(weights, shares[:, ids], inputs[ids], labels[ids])
        velocity = training.momentum * velocity + gradient
        weights = weights - training.rate * velocity
    return weights
