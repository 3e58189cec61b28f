"""What everybody is asked: a network, the training samples, and two sets of query samples. Needs nothing but torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.models import VGG, LeNet5

Samples = tuple[Tensor, Tensor]


def mlp() -> nn.Module:
    """Three linear layers for images of 28x28."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": mlp,
    "LeNet-5": LeNet5,
    "VGG16, an eighth as wide": lambda: VGG(width=8),
}


@dataclass(frozen=True)
class Case:
    """``train`` and each of ``queries`` are (inputs, labels); ``state`` is of the trained network."""

    network: str
    state: dict[str, Tensor]
    train: Samples
    queries: list[Samples]

    def model(self) -> nn.Module:
        """A new one, in evaluation mode."""
        model = NETWORKS[self.network]()
        model.load_state_dict(self.state)
        return model.eval()

    def save(self, path: Path) -> None:
        """To one file."""
        torch.save(asdict(self), path)

    @classmethod
    def load(cls, path: Path) -> Case:
        """From the file."""
        return cls(**torch.load(path, weights_only=True))


def last_layer(model: nn.Module) -> str:
    """The name of the last linear layer."""
    return [name for name, each in model.named_modules() if isinstance(each, nn.Linear)][-1]


def batches(samples: Samples, size: int) -> Iterator[Samples]:
    """In order."""
    yield from zip(*(each.split(size) for each in samples), strict=True)
