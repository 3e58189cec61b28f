"""Products with the Hessian of a model's mean loss, by differentiating twice: exact, and as slow as training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaql.errors import QueryError

_ONCE = "the model can't be differentiated twice, which its Hessian takes: {}. Use 'ekfac', which needs no Hessian"
Losses = Callable[[Mapping[str, Tensor], Any], Tensor]


class Hessian:
    """That of the mean of ``losses(parameters, batch)`` [n] over all samples of ``batches``, as an operator.

    Its vectors are the parameters' one after another, each flattened. It is symmetric and need not be positive.
    """

    def __init__(self, losses: Losses, parameters: Mapping[str, Tensor], batches: Sequence[Any]) -> None:
        self._losses = losses
        self._parameters = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
        self._batches = batches
        # Whether the graph was looked through, which takes as long as a small product.
        self._is_whole = False
        self.width = sum(value.numel() for value in self._parameters.values())

    @cached_property
    def sizes(self) -> list[int]:
        """How many samples each batch has."""
        with torch.no_grad():
            return [len(self._losses(self._parameters, batch)) for batch in self._batches]

    def times(self, vector: Tensor) -> Tensor:
        """H v, [width], over all batches."""
        total, samples = torch.zeros_like(vector), 0
        for number in range(len(self._batches)):
            product, count = self._sum(number, vector)
            total, samples = total + product, samples + count
        return total / max(samples, 1)

    def times_batch(self, number: int, vector: Tensor) -> Tensor:
        """H v, [width], of one batch's mean loss."""
        product, count = self._sum(number, vector)
        return product / max(count, 1)

    def _sum(self, number: int, vector: Tensor) -> tuple[Tensor, int]:
        values = list(self._parameters.values())
        # Fused attention can't be differentiated twice.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            losses = self._losses(self._parameters, self._batches[number])
            # Not for their own sake, but so that functions with no second derivative know that one is asked for.
            ones = torch.ones_like(losses, requires_grad=True)
            first = _differentiated((losses * ones).sum(), values, create_graph=True)
            slope = sum((one * other).sum() for one, other in zip(first, self._split(vector), strict=True))
        if not (isinstance(slope, Tensor) and slope.requires_grad):
            return torch.zeros_like(vector), len(losses)
        if not self._is_whole:
            _require_whole(slope)
            self._is_whole = True
        second = _differentiated(slope, values)
        return torch.cat([each.flatten() for each in second]).to(vector), len(losses)

    def _split(self, vector: Tensor) -> Iterator[Tensor]:
        first = 0
        for value in self._parameters.values():
            yield vector[first : first + value.numel()].reshape(value.shape).to(value)
            first += value.numel()


def _differentiated(value: Tensor, values: Sequence[Tensor], create_graph: bool = False) -> Sequence[Tensor]:
    try:
        return torch.autograd.grad(value, values, create_graph=create_graph, materialize_grads=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise QueryError(_ONCE.format(error)) from error


def _require_whole(slope: Tensor) -> None:
    """QueryError where a function of the model's own ends the graph of the first derivative.

    Autograd raises only if it comes across that end, and takes what lies behind it for constant.
    """
    seen, pending = set(), [slope.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        if type(node).__name__ == "Error":
            raise QueryError(_ONCE.format("a function in it is marked once_differentiable"))
        seen.add(node)
        pending += [following for following, _ in node.next_functions]
