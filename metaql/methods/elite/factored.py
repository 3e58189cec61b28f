"""One forward and one backward pass of a batch, from which any ⟨∇Ω_i, G⟩ and any Σ v_i ∇Ω_i follow.

The forward pass runs under a torch function mode that notes every call with a trainable parameter: calls and not
modules, so that a module used twice, tied weights and functional calls need no case of their own. The backward pass
stops at the outputs of these calls; it forms no gradient of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.overrides import TorchFunctionMode

from metaql.methods.elite.operations import OPERATIONS, Call, bind, mixes

# Sums of float32 products in another order differ by this much of their size, and wrong ones by far more.
TOLERANCE = {torch.float64: 1e-9}
USUAL_TOLERANCE = 1e-3


class NoFactorsError(Exception):
    """The scores can't be differentiated from factors; the text says why."""


@dataclass(frozen=True)
class _Use:
    call: Call
    weight: str | None
    bias: str | None
    edge: GradientEdge
    version: int


# Uses, each with its input and ∂(sum of the terms)/∂y for some samples.
Factors = list[tuple[_Use, Tensor, Tensor]]


class _Capture(TorchFunctionMode):
    """Notes calls with these parameters (id => name); ``reason`` says what is in the way of factors, if anything."""

    def __init__(self, names: Mapping[int, str], samples: int) -> None:
        super().__init__()
        self.uses: list[_Use] = []
        self.reason: str | None = None
        self._names = names
        self._samples = samples

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self._touches(args) or (kwargs and self._touches(list(kwargs.values()))):
            self._look(func, args, kwargs, output)
        elif func is F.batch_norm and mixes(func, _named(func, args) | kwargs):
            self.reason = "batch norm in training mode mixes the samples of a batch"
        return output

    def _touches(self, values: Collection[Any]) -> bool:
        """Whether a parameter is among the values; quick, since every function of a forward pass is asked."""
        found = not self._names.keys().isdisjoint(map(id, values))
        return found or any(self._touches(each) for each in values if type(each) in (tuple, list))

    def _look(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not any(each.requires_grad for each in _tensors((output,))):
            return
        call = bind(func, args, kwargs)
        if call is None or id(call.inputs) in self._names or len(output) != self._samples:
            names = (self._names.get(id(each)) for each in _tensors((*args, *kwargs.values())))
            name = min(each for each in names if each is not None)
            self.reason = f"'{name}' is used by {getattr(func, '__name__', func)} in a way that has no factors"
        else:
            weight, bias = (self._names.get(id(each)) for each in call.parameters)
            edge = GradientEdge(output.grad_fn, output.output_nr)
            self.uses.append(_Use(call, weight, bias, edge, call.inputs._version))


def _named(func: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, Any]:
    return dict(zip(OPERATIONS[func].names, args, strict=False))


def _tensors(values: Any) -> Iterator[Tensor]:
    for each in values:
        if isinstance(each, Tensor):
            yield each
        elif isinstance(each, (tuple, list)):
            yield from _tensors(each)
        elif isinstance(each, dict):
            yield from _tensors(each.values())


class FactoredPass:
    """The ``scores`` of a batch and, after ``backward``, sums of products with their gradients.

    ``parameters`` are the trainable ones by name. NoFactorsError where there are no factors.
    """

    def __init__(self, score: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor], inputs: Tensor) -> None:
        capture = _Capture({id(each): name for name, each in parameters.items()}, len(inputs))
        with capture:
            self.graph = score(inputs)
        if capture.reason is not None:
            raise NoFactorsError(capture.reason)
        self.scores = self.graph.detach()
        self._uses = capture.uses

    def backward(self, slopes: Tensor, sizes: list[int], keep_graph: bool = False) -> list[Factors]:
        """The factors of the terms of Σ ``slopes`` Ω, one term for each sample, for parts of so many samples each."""
        if any(use.call.inputs._version != use.version for use in self._uses):
            raise NoFactorsError("the input of a layer is changed in place after it")
        edges = [use.edge for use in self._uses]
        found = torch.autograd.grad(self.graph, edges, slopes, keep_graph, allow_unused=True) if edges else ()
        parts: list[Factors] = [[] for _ in sizes]
        for use, dy in zip(self._uses, found, strict=True):
            if dy is not None:
                pairs = zip(
                    torch.split_with_sizes(use.call.inputs.detach(), sizes),
                    torch.split_with_sizes(dy, sizes),
                    strict=True,
                )
                for part, (inputs, own) in zip(parts, pairs, strict=True):
                    part.append((use, inputs, own))
        return parts


def along(factors: Factors, direction: Mapping[str, Tensor], scores: Tensor) -> Tensor:
    """⟨∇ of the term of each sample, G⟩, like ``scores`` [n]; parameters that are not in G count as zero there."""
    total: Tensor | None = None
    for use, inputs, dy in factors:
        weight, bias = (direction.get(name) if name is not None else None for name in (use.weight, use.bias))
        if weight is not None or bias is not None:
            moved = use.call.along(inputs, weight, bias).mul_(dy)
            product = moved.sum(1) if moved.ndim == 2 else moved.flatten(1).sum(1)
            total = product if total is None else total.add_(product)
    return torch.zeros_like(scores) if total is None else total.to(scores.dtype)


def gradient(factors: Factors, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Σ v_i ∇(term i) by parameter, where v is ``weights``, or 1. Parameters without a use are left out."""
    total: dict[str, Tensor] = {}
    for use, inputs, dy in factors:
        found = use.call.gradient(inputs, dy, (use.weight is not None, use.bias is not None), weights)
        for name, value in zip((use.weight, use.bias), found, strict=True):
            if name is not None and value is not None:
                total[name] = total[name] + value if name in total else value
    return total


def require_own_gradients(score: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor], inputs: Tensor) -> None:
    """NoFactorsError unless factors give the gradient that autograd gives, of a random mixture of the samples' scores.

    A random mixture, since no wrong assignment of gradients to samples survives it: neither scores that depend on
    other samples, nor a use of a parameter that was not seen.
    """
    generator = torch.Generator().manual_seed(0)
    taken = FactoredPass(score, parameters, inputs)
    mixture = torch.rand(len(inputs), generator=generator, dtype=torch.float64).add(0.5).to(taken.scores)
    factors = taken.backward(torch.ones_like(taken.scores), [len(inputs)], keep_graph=True)[0]
    truth = torch.autograd.grad(taken.graph, list(parameters.values()), mixture, allow_unused=True)
    found = gradient(factors, mixture)
    tolerance = TOLERANCE.get(taken.scores.dtype, USUAL_TOLERANCE)
    # A gradient may be nothing but rounding, as that of a bias before a norm.
    size = max((float(each.norm()) for each in truth if each is not None), default=0.0)
    for name, expected in zip(parameters, truth, strict=True):
        own = found.get(name)
        if (own is None) != (expected is None):
            raise NoFactorsError(f"the uses of '{name}' were not all seen")
        if own is not None and expected is not None:
            allowed = tolerance * (expected.norm() + size * tolerance)
            if not bool((own - expected).norm() <= allowed):
                raise NoFactorsError(
                    f"other samples, or a use that was not seen, take part in the gradient of '{name}'"
                )
