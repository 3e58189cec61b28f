"""What is known of a way of scoring, without importing what it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from bench.peers.case import Case

# The scores [training samples, query samples] of the query samples with this number.
Ask = Callable[[int], Tensor]

ALL = "all"
LAST = "last layer"
LAST_WEIGHT = "last layer, without bias"


@dataclass(frozen=True)
class Way:
    """``start`` does what is done once and returns how to ask.

    It may write into the folder that it is given, which is also the working directory. ``package`` is whose version
    is told, and, where it is not ours, the name of its requirements and environment; ``imports`` are timed apart.
    ``covers`` says which parameters; ``exact``, whether scores are meant to be inner products of their gradients;
    ``recomputes``, whether a second query runs the training samples through the network again.
    """

    name: str
    package: str
    start: Callable[[Case, Path], Ask]
    imports: tuple[str, ...]
    settings: str
    covers: str = ALL
    exact: bool = True
    recomputes: bool = True
    ours: bool = False
    # Scores outside of the ten best of each query sample are NaN.
    ten_best: bool = False
    # The way that computes the same approximation.
    agrees_with: str | None = None
