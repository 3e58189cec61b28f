"""Training that is recorded step by step: LeNet-5 on Fashion-MNIST, and whatever else is given."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaql
from bench.models import LeNet5

Step = Callable[[Tensor, torch.optim.Optimizer], AbstractContextManager[None]]


@dataclass(frozen=True)
class Training:
    """SGD with momentum, over batches that are shuffled anew in each epoch; the rate is constant, or falls to zero."""

    epochs: int
    batch: int = 64
    rate: float = 0.01
    momentum: float = 0.9
    seed: int = 0
    falling: bool = False

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A new one."""
        return torch.optim.SGD(model.parameters(), lr=self.rate, momentum=self.momentum)

    def batches(self, samples: int) -> list[list[Tensor]]:
        """For each epoch the samples' places, batch by batch; the same at every call."""
        generator = torch.Generator().manual_seed(self.seed)
        return [list(torch.randperm(samples, generator=generator).split(self.batch)) for _ in range(self.epochs)]

    def run(
        self,
        model: nn.Module,
        inputs: Tensor,
        labels: Tensor,
        step: Step = lambda _ids, _optimizer: nullcontext(),
        after_epoch: Callable[[int, torch.optim.Optimizer], None] = lambda _epoch, _optimizer: None,
    ) -> torch.optim.Optimizer:
        """Trains the model; ``step`` stands around every pass."""
        optimizer = self.optimizer(model)
        share = 1 / sum(map(len, self.batches(len(labels)))) if self.falling else 0.0
        for epoch, batches in enumerate(self.batches(len(labels)), start=1):
            for ids in batches:
                batch, targets = inputs[ids], labels[ids]
                optimizer.zero_grad()
                with step(ids, optimizer):
                    F.cross_entropy(model(batch), targets).backward()
                optimizer.step()
                for group in optimizer.param_groups:
                    group["lr"] -= self.rate * share
            after_epoch(epoch, optimizer)
        return optimizer


def lenet(seed: int = 0) -> LeNet5:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return LeNet5()


def scores(path: Path, text: str, samples: int, **relations: Any) -> Tensor:
    """A query's (sample_id, score) rows as a vector [samples], float64; 0 for samples without a row."""
    with metaql.connect(path) as db:
        for name, relation in relations.items():
            db.register(name, relation)
        return by_sample(db.sql(text).fetchall(), samples)


def by_sample(rows: list[tuple[int, float]], samples: int) -> Tensor:
    """(sample_id, score) rows as a vector [samples], float64; 0 for samples without a row."""
    found = torch.zeros(samples, dtype=torch.float64)
    ids, values = zip(*rows, strict=True)
    found[torch.tensor(ids)] = torch.tensor(values, dtype=torch.float64)
    return found


def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """The share of samples whose label has the largest logit."""
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).double().mean())
