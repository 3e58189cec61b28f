"""What a training run is told, and what it tells while it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from metaql.errors import QueryError
from metaql.methods.numbers import require_seed, require_whole

WITHOUT_META_GRADIENTS = ("deepsad", "supervised")


@dataclass(frozen=True)
class Settings:
    """How to train; QueryError for numbers that make no sense. ``docs/elite.md`` says why the defaults are these.

    ``detector`` is 'svdd', 'autoencoder' or a registered one, or for comparison 'deepsad' or 'supervised' (the same
    hinge trained on the labels alone). ``network`` is 'mlp', 'conv1d', 'conv2d' or a registered one; None takes what
    fits the rows' shape. ``epochs`` None goes through the rows 15 times, or more often where there are few.
    ``settled``: rows whose pseudo label has stayed the same for so many epochs skip the meta-gradient.
    """

    detector: str = "svdd"
    network: str | None = None
    epochs: int | None = None
    batch_size: int = 128
    learning_rate: float = 3e-4
    seed: int = 0
    settled: int | None = None

    def __post_init__(self) -> None:
        require_whole("batch_size", self.batch_size)
        for name in ("epochs", "settled"):
            if getattr(self, name) is not None:
                require_whole(name, getattr(self, name))
        require_seed(self.seed)
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise QueryError(f"learning_rate must be a number greater than 0, such as 3e-4, not {rate!r}")


@dataclass(frozen=True)
class Progress:
    """Where training stands after a batch; epochs and batches count from 1."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    validation_loss: float | None
