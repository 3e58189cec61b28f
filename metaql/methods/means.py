"""A mean over samples that arrive batch by batch, here and in other processes."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor


class Mean:
    """What ``_plus`` adds up for so many ``samples``; float64."""

    def __init__(self) -> None:
        self._total: Tensor | None = None
        self.samples = 0

    def merge(self, other: Self) -> None:
        """Adds what another one has seen of the same layer, in the same basis if there is one."""
        if other._total is not None:
            self._plus(other._total)
        self.samples += other.samples

    @property
    def mean(self) -> Tensor | None:
        """The mean over samples; None before any sample was seen."""
        return None if self._total is None else self._total / max(self.samples, 1)

    def _plus(self, more: Tensor) -> None:
        self._total = more.to(torch.float64, copy=True) if self._total is None else self._total.add_(more)
