"""What a round is told, and what it tells while it goes on."""

from __future__ import annotations

from dataclasses import dataclass

from metaql.errors import QueryError
from metaql.methods.numbers import require_seed, require_whole

EMBEDDINGS = ("semigan", "supervised", "ready")


@dataclass(frozen=True)
class Settings:
    """How to embed and how much to ask; QueryError for what makes no sense.

    ``budget`` is how many rows a person is asked for. ``embedding`` is 'semigan', 'supervised' (the same without a
    generator), or 'ready' where the rows are embeddings already, which are only brought to a common scale. ``network``
    is 'mlp', 'conv1d', 'conv2d' or a registered one; None takes what fits the rows' shape. ``epochs`` None goes
    through the rows as often as it takes for enough steps.
    """

    budget: int = 50
    embedding: str = "semigan"
    network: str | None = None
    epochs: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole("budget", self.budget)
        if self.epochs is not None:
            require_whole("epochs", self.epochs)
        require_seed(self.seed)
        if self.embedding not in EMBEDDINGS:
            raise QueryError(f"there is no embedding {self.embedding!r}, only {', '.join(EMBEDDINGS)}")
        if self.embedding == "ready" and self.network is not None:
            raise QueryError("rows that are embeddings already go through no network: leave out network")


@dataclass(frozen=True)
class Progress:
    """Where training stands after a batch; epochs and batches count from 1."""

    epoch: int
    epochs: int
    batch: int
    batches: int
    loss: float
