"""Second moments of a layer's positions, A = E[a aᵀ] of suffixes and S = E[b bᵀ] of prefixes, as batches come.

A is the mean over positions, S the sum over a sample's positions, averaged over samples: then A ⊗ S is the layer's
Fisher matrix where positions are independent of one another (Grosse and Martens 2016). A mean over positions
in both, as others take, would leave K-FAC too small by their number, layer by layer; EK-FAC has eigenvalues of its own.

Letters: n samples, s positions of a sample, p positions of all, g groups, i one group's input width (and one more for
a bias), o one group's output width.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """The sums for one layer, group by group; a layer with a bias has an input that is always 1.

    Products of a batch are taken in its own type and added up in float64, of which A and S have g·(i² + o²) numbers: in
    float32 the sum over millions of positions would lose what small eigenvalues consist of.
    """

    def __init__(self, groups: int, bias: bool) -> None:
        self._groups, self._bias = groups, bias
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None
        self.positions = 0
        self.samples = 0

    def add(self, suffix: Tensor, prefix: Tensor) -> None:
        """The positions of n samples: [n, s, g·i] without the 1, and [n, s, g·o]."""
        n, s = suffix.shape[:2]
        self._inputs = _plus(self._inputs, _gram(by_group(suffix.flatten(0, 1), self._groups), self._bias))
        self._outputs = _plus(self._outputs, _gram(by_group(prefix.flatten(0, 1), self._groups), bias=False))
        self.positions += n * s
        self.samples += n

    def merge(self, other: Moments) -> None:
        """Adds what another one has seen of the same layer."""
        if other._inputs is not None and other._outputs is not None:
            self._inputs, self._outputs = _plus(self._inputs, other._inputs), _plus(self._outputs, other._outputs)
        self.positions += other.positions
        self.samples += other.samples

    @property
    def inputs(self) -> Tensor | None:
        """A, float64 [g, i, i]; None before any position was seen."""
        return None if self._inputs is None else self._inputs / max(self.positions, 1)

    @property
    def outputs(self) -> Tensor | None:
        """S, float64 [g, o, o]; None before any position was seen."""
        return None if self._outputs is None else self._outputs / max(self.samples, 1)


def by_group(values: Tensor, groups: int) -> Tensor:
    """[p, g·w] => [g, p, w]."""
    found: Tensor = values.unflatten(1, (groups, values.shape[1] // groups)).transpose(0, 1)
    return found


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more.to(torch.float64, copy=True) if total is None else total.add_(more)


def _gram(values: Tensor, bias: bool) -> Tensor:
    """Σ_p v vᵀ of [g, p, w], with a 1 behind each v if asked for: [g, w(+1), w(+1)]."""
    groups, positions, width = values.shape
    products = values.transpose(1, 2) @ values
    if not bias:
        return products
    found = products.new_empty(groups, width + 1, width + 1)
    found[:, :width, :width] = products
    found[:, :width, width] = found[:, width, :width] = values.sum(1)
    found[:, width, width] = positions
    return found
