"""dattri's Grad-Dot (TracIn with weight one), in full and with its default projection."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from bench.peers.case import Case, Samples
from bench.peers.way import Ask, Way

BATCH = 500
TRACIN = "dattri TracIn, all checkpoints"


def grad_dot(case: Case, folder: Path, projects: bool) -> Ask:
    """Gradients of the query samples are computed anew for each batch of training samples."""
    attributor = _attributor(case.model(), [case.state], [1.0], projects)
    train = _loader(case.train, BATCH)
    return lambda number: attributor.attribute(train, _loader(case.queries[number], len(case.queries[number][0])))


def tracin(
    model: nn.Module, states: list[dict[str, Tensor]], rates: list[float], train: Samples, query: Samples
) -> dict[str, Tensor]:
    """TracIn over checkpoints with their learning rates, in full: scores [training samples, query samples]."""
    attributor = _attributor(model, states, rates, projects=False)
    return {TRACIN: attributor.attribute(_loader(train, BATCH), _loader(query, len(query[0])))}


def _attributor(model: nn.Module, states: list[dict[str, Tensor]], weights: list[float], projects: bool) -> Any:
    from dattri.algorithm.tracin import TracInAttributor
    from dattri.task import AttributionTask

    def loss(parameters: dict[str, Tensor], sample: Any) -> Tensor:
        image, label = sample
        return F.cross_entropy(functional_call(model, parameters, image[None]), label[None])

    attributor = TracInAttributor(
        AttributionTask(loss, model, states), weight_list=torch.tensor(weights), normalized_grad=False
    )
    if not projects:
        attributor.projector_kwargs = None
    return attributor


def _loader(samples: Samples, size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*samples), batch_size=size)


_IMPORTS = ("dattri.algorithm.tracin", "dattri.task")

WAYS = [
    Way(
        "dattri TracIn",
        "dattri",
        partial(grad_dot, projects=False),
        _IMPORTS,
        "projector_kwargs = None, batches of 500, all query samples in one",
    ),
    Way(
        "dattri TracIn, projected",
        "dattri",
        partial(grad_dot, projects=True),
        _IMPORTS,
        "its default projection to 512 numbers, batches of 500, all query samples in one",
        exact=False,
    ),
]
