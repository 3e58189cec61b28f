"""A loop over torch.func's per-sample gradients, as in PyTorch's own tutorial."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from bench.peers.case import Case, Samples, batches
from bench.peers.way import Ask, Way

BATCH = 100


def gradients_of(case: Case) -> Callable[[Samples], Tensor]:
    """(inputs, labels) => gradients [samples, parameters]."""
    model = case.model()
    parameters = {name: each.detach() for name, each in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, image[None]), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0))
    return lambda samples: torch.cat([one.flatten(1) for one in each(parameters, *samples).values()], 1)


def loop(case: Case, folder: Path) -> Ask:
    """Training gradients are dropped once they are multiplied."""
    gradients = gradients_of(case)

    def ask(number: int) -> Tensor:
        query = gradients(case.queries[number])
        return torch.cat([gradients(each) @ query.T for each in batches(case.train, BATCH)])

    return ask


def kept(case: Case, folder: Path) -> Ask:
    """Training gradients stay in memory for the next query."""
    gradients = gradients_of(case)
    train = torch.empty(len(case.train[0]), sum(each.numel() for each in case.model().parameters()))
    for rows, each in zip(train.split(BATCH), batches(case.train, BATCH), strict=True):
        rows.copy_(gradients(each))
    return lambda number: train @ gradients(case.queries[number]).T


WAYS = [
    Way("torch.func", "torch", loop, (), "vmap(grad), batches of 100", ours=True),
    Way(
        "torch.func, gradients kept in memory",
        "torch",
        kept,
        (),
        "vmap(grad), batches of 100; all training gradients stay in memory",
        recomputes=False,
        ours=True,
    ),
]
