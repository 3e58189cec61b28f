"""Exact gradients of parameters without factors, by running the samples again.

``by_function`` vectorises autograd over samples with torch.func; ``by_loop`` runs plain autograd on one sample
after another, which works for everything that trains, slowly.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from metaql.errors import BatchError
from metaql.storage.recording.batches import per_sample, take
from metaql.storage.recording.losses import ModelLosses

# Elements of gradients that one vectorised pass may hold.
CHUNK_ELEMENTS = 1 << 24

Gradients = dict[str, Tensor]


def by_function(
    losses: ModelLosses, parameters: Mapping[str, torch.nn.Parameter], batch: Any, samples: int
) -> Gradients:
    """name => [n, *shape], by one vectorised pass over the batch.

    Whatever torch.func can't do raises, with torch's own error.
    """
    own, rebuild = per_sample(batch, samples)
    # Every sample gets its own view of the weights: torch's recurrent layers add in place to what the
    # weights alone made, which vmap allows only where that has the samples' dimension as well.
    weights = {
        f"model.{name}": parameter.detach().expand(samples, *parameter.shape) for name, parameter in parameters.items()
    }

    def loss_of_one(weights: dict[str, Tensor], *tensors: Tensor) -> Tensor:
        value: Tensor = functional_call(losses, weights, (rebuild([tensor.unsqueeze(0) for tensor in tensors]),))
        return value.squeeze(0)

    width = sum(parameter.numel() for parameter in parameters.values())
    chunk = max(1, CHUNK_ELEMENTS // max(width, 1))
    with warnings.catch_warnings(), _attributes_kept(losses):
        # vmap loops over samples in some operations, and says so.
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
        gradients = vmap(grad(loss_of_one), chunk_size=chunk)(weights, *own)
    return {name: gradients[f"model.{name}"].detach() for name in parameters}


@contextmanager
def _attributes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Puts back what modules keep as attributes: tensors of torch.func are of no use after it."""
    kept = [(each, dict(vars(each))) for each in module.modules()]
    try:
        yield
    finally:
        for each, attributes in kept:
            vars(each).update(attributes)


def by_loop(
    losses: ModelLosses,
    parameters: Mapping[str, torch.nn.Parameter],
    batch: Any,
    samples: int,
    chosen: Sequence[int] | None = None,
) -> tuple[Gradients, Tensor]:
    """name => [n or the chosen samples, *shape] and the samples' losses, by a backward pass for each sample alone."""
    chosen = range(samples) if chosen is None else chosen
    rows = [_of_one(losses, parameters, take(batch, samples, [sample])) for sample in chosen]
    gradients = {name: torch.stack([row[name] for row, _ in rows]) for name in parameters}
    return gradients, torch.stack([loss for _, loss in rows])


def within_batch(values: Tensor, parameters: Mapping[str, torch.nn.Parameter], chosen: Sequence[int]) -> Gradients:
    """name => [chosen samples, *shape], from the batch's own losses [n]: one backward pass over it for each."""
    rows = [
        torch.autograd.grad(
            values[sample],
            list(parameters.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for sample in chosen
    ]
    return {name: torch.stack([row[place].to_dense() for row in rows]) for place, name in enumerate(parameters)}


def _of_one(losses: ModelLosses, parameters: Mapping[str, torch.nn.Parameter], batch: Any) -> tuple[Gradients, Tensor]:
    # backward rather than autograd.grad, which reentrant activation checkpointing refuses; so the
    # gradients the user has accumulated are set aside.
    everything = list(losses.parameters())
    kept = [parameter.grad for parameter in everything]
    for parameter in everything:
        parameter.grad = None
    try:
        loss = losses(batch)
        if loss.shape != (1,):
            raise BatchError(f"A batch cut to one sample has losses of shape {list(loss.shape)}.")
        loss.sum().backward()
        return {name: _dense(parameter) for name, parameter in parameters.items()}, loss.detach().squeeze(0)
    finally:
        for parameter, gradient in zip(everything, kept, strict=True):
            parameter.grad = gradient


def _dense(parameter: torch.nn.Parameter) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros_like(parameter).detach()
    return gradient.to_dense() if gradient.layout != torch.strided else gradient
