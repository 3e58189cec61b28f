"""What a training run is told, and what it tells while it goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from metaql.errors import QueryError

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
        for name in ("epochs", "batch_size", "settled"):
            value = getattr(self, name)
            optional = name != "batch_size"
            if not (optional and value is None) and not (_is_integer(value) and value >= 1):
                raise QueryError(f"{name} must be a whole number from 1 on, not {value!r}")
        if not _is_integer(self.seed) or not 0 <= self.seed < 2**63:
            raise QueryError(f"seed must be a whole number from 0 on, not {self.seed!r}")
        rate = self.learning_rate
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise QueryError(f"learning_rate must be a number greater than 0, such as 3e-4, not {rate!r}")

    def described(self) -> dict[str, Any]:
        """The settings by name, as JSON has them."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Progress:
    """Where training stands after a batch; epochs and batches count from 1."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    validation_loss: float | None
