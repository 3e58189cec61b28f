"""What ``bench.lds`` asks about: networks that are trained on all samples, and again and again on halves of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from bench import data
from bench.peers.case import Samples
from bench.peers.trained import Trained
from bench.recorded_training import Training, accuracy, lenet

CHECKPOINTS = 4


@dataclass(frozen=True)
class Task:
    """A network, its training, and how much there is of everything.

    ``read`` gives a split's samples and ``network`` a seed's weights. Each of ``halves`` of ``samples`` is trained on
    ``times`` times, and ``asked`` networks are trained on all of them, recorded, and asked about ``tests`` samples.
    """

    name: str
    read: Callable[[str], Samples]
    network: Callable[[int], nn.Module]
    training: Training
    samples: int
    tests: int
    halves: int
    times: int
    asked: int

    @property
    def train(self) -> Samples:
        """All training samples."""
        return _first(self.read("train"), self.samples)

    @property
    def test(self) -> Samples:
        """Those whose losses are to be foretold."""
        return _first(self.read("test"), self.tests)


def _first(samples: Samples, count: int) -> Samples:
    # Copies, since a part of a tensor takes all of it along when it is saved.
    return samples[0][:count].clone(), samples[1][:count].clone()


def small_mnist(split: str) -> Samples:
    """MNIST at 14x14, centred."""
    images, labels = data.mnist(split)
    return F.avg_pool2d(images, 2) - 0.13, labels


def mlp(seed: int) -> nn.Module:
    """For images of 14x14; the same weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))


def tasks(full: bool) -> list[Task]:
    """All of them; ``full`` has more of everything."""
    few = (1000, 200, 100, 4, 8) if full else (500, 100, 100, 2, 5)
    fewer = (1000, 200, 100, 4, 8) if full else (500, 100, 60, 2, 5)
    return [
        *(
            Task(f"MNIST, MLP, {epochs} epochs", small_mnist, mlp, Training(epochs, batch=32, rate=0.02), *few)
            for epochs in (20, 60)
        ),
        Task("Fashion-MNIST, LeNet-5, 24 epochs", data.fashion_mnist, lenet, Training(24, batch=32, rate=0.02), *fewer),
    ]


def halves(task: Task) -> Tensor:
    """Which samples are in each half, bool [halves, samples]."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(task.samples, generator=generator) for _ in range(task.halves)])
    return orders < task.samples // 2


def retrained(chosen: Tensor, task: Task) -> Tensor:
    """Test losses of networks that were trained on each half, [times, halves, tests]."""
    (inputs, labels), test = task.train, task.test
    losses = torch.zeros(task.times, len(chosen), task.tests)
    for time in range(task.times):
        for number, part in enumerate(chosen):
            # No two trainings share a seed, nor one with a network that is asked.
            own = task.asked + time * len(chosen) + number
            model = task.network(own)
            replace(task.training, seed=own).run(model, inputs[part], labels[part])
            with torch.no_grad():
                losses[time, number] = F.cross_entropy(model(test[0]), test[1], reduction="none")
    return losses


def record(path: Path, task: Task, seed: int) -> tuple[Trained, float]:
    """Records the training on all samples, with checkpoints, and the curvature; the test samples' accuracy too."""
    (inputs, labels), test, model = task.train, task.test, task.network(seed)
    states: list[dict[str, Tensor]] = []
    rates: list[float] = []
    with metaql.Recorder(model, path) as recorder:

        def after_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch % (task.training.epochs // CHECKPOINTS) == 0:
                recorder.checkpoint(optimizer, epoch=epoch)
                recorder.collect(TensorDataset(inputs, labels), "train")
                recorder.collect(TensorDataset(*test), "validation")
                states.append({name: each.detach().clone() for name, each in model.state_dict().items()})
                rates.append(float(optimizer.param_groups[0]["lr"]))

        replace(task.training, seed=seed).run(model, inputs, labels, recorder.step, after_epoch)
        shuffled = _shuffled((inputs, labels), seed)
        recorder.curvature(shuffled)
        recorder.curvature(shuffled, "diagonal")
    return Trained(model.eval(), states, rates, (inputs, labels), test), accuracy(model, *test)


def _shuffled(samples: Samples, seed: int) -> list[tuple[Tensor, Samples]]:
    """Samples with their ids in an order of their own: the Fisher matrix' labels are drawn one after another."""
    generator = torch.Generator().manual_seed(seed)
    orders = torch.randperm(len(samples[0]), generator=generator).split(256)
    return [(ids, (samples[0][ids], samples[1][ids])) for ids in orders]
