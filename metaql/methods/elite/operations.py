"""Operations that are linear in their parameters: what each adds to ⟨∇Ω_i, G⟩ and to a weighted gradient.

Of y = op(a; W, b), with dy_i = ∂Ω_i/∂y: the derivative of y along G is op(a; G_W, G_b), the same operation with G in
the parameters' place. So ⟨∇Ω_i, G⟩ is its product with dy_i, and no sample's gradient is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Operation:
    """A function's arguments, how many axes its input has with the samples', and whether it is bilinear in it and W."""

    names: tuple[str, ...]
    input_dims: int | None = None
    transposed: bool = False
    bilinear: bool = False


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _convolutions() -> dict[Callable[..., Any], Operation]:
    found: dict[Callable[..., Any], Operation] = {}
    for dims in (1, 2, 3):
        found[getattr(torch, f"conv{dims}d")] = Operation(_CONVOLUTION, dims + 2, bilinear=True)
        found[getattr(torch, f"conv_transpose{dims}d")] = Operation(_TRANSPOSED, dims + 2, True, bilinear=True)
    return found


OPERATIONS: dict[Callable[..., Any], Operation] = {
    F.linear: Operation(("input", "weight", "bias"), bilinear=True),
    F.layer_norm: Operation(("input", "normalized_shape", "weight", "bias", "eps")),
    F.group_norm: Operation(("input", "num_groups", "weight", "bias", "eps")),
    F.batch_norm: Operation(("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")),
    **_convolutions(),
}


@dataclass(frozen=True)
class Call:
    """One call of such a function, by the names of its arguments."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def inputs(self) -> Tensor:
        value: Tensor = self.arguments["input"]
        return value

    @property
    def parameters(self) -> tuple[Any, Any]:
        return self.arguments.get("weight"), self.arguments.get("bias")

    def along(self, inputs: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The derivative of the output for these rows of the input along a direction of weight and bias; None is 0."""
        weight = torch.zeros_like(self.arguments["weight"]) if weight is None else weight
        if self.function is F.linear:
            return F.linear(inputs, weight, bias)
        output: Tensor = self.function(**self.arguments | {"input": inputs, "weight": weight, "bias": bias})
        return output

    def gradient(
        self, inputs: Tensor, dy: Tensor, needs: tuple[bool, bool], weights: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias, where ``needs`` says so, from rows of the input and ∂/∂y of them.

        Sums over the rows, with ``weights`` if there are any.
        """
        operation = OPERATIONS[self.function]
        if weights is not None:
            # A weight's gradient is linear in either, and a bias' in dy alone.
            if operation.bilinear and not needs[1] and inputs.numel() < dy.numel():
                inputs = inputs * _rows_of(weights, inputs)
            else:
                dy = dy * _rows_of(weights, dy)
        if self.function is F.linear:
            if dy.ndim > 2:
                dy, inputs = dy.reshape(-1, dy.shape[-1]), inputs.reshape(-1, inputs.shape[-1])
            return dy.T @ inputs if needs[0] else None, dy.sum(0) if needs[1] else None
        if operation.bilinear and not isinstance(self.arguments.get("padding"), str):
            return self._convolution_gradient(inputs, dy, needs)
        return self._gradient_by_autograd(inputs, dy, needs)

    def _convolution_gradient(
        self, inputs: Tensor, dy: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        weight = self.arguments["weight"].detach()
        stride, padding, dilation, extra = (
            _each(self.arguments.get(name, usual), inputs.ndim - 2)
            for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
        )
        _, dW, db = torch.ops.aten.convolution_backward(
            dy, inputs, weight, [dy.shape[1]] if needs[1] else None, stride, padding, dilation,
            OPERATIONS[self.function].transposed, extra, self.arguments.get("groups", 1), [False, *needs],
        )  # fmt: skip
        return dW, db

    def _gradient_by_autograd(
        self, inputs: Tensor, dy: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        values = {
            name: self.arguments[name].detach().requires_grad_()
            for name, needed in zip(("weight", "bias"), needs, strict=True)
            if needed
        }
        with torch.enable_grad():
            output = self.function(**self.arguments | {"input": inputs} | values)
        found = dict(zip(values, torch.autograd.grad(output, list(values.values()), dy), strict=True))
        return found.get("weight"), found.get("bias")


def _rows_of(weights: Tensor, values: Tensor) -> Tensor:
    return weights.view(-1, *[1] * (values.ndim - 1))


def _each(value: Any, dims: int) -> list[int]:
    sizes = list(value) if isinstance(value, (tuple, list)) else [value]
    return sizes * dims if len(sizes) == 1 else sizes


def bind(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """The call, if it treats every row of its input apart from the others and is linear in its parameters."""
    operation = OPERATIONS.get(function)
    if operation is None:
        return None
    call = Call(function, dict(zip(operation.names, args, strict=False)) | kwargs)
    plain = isinstance(call.arguments.get("weight"), Tensor) and call.inputs.ndim > 1
    whole = operation.input_dims is None or call.inputs.ndim == operation.input_dims
    return call if plain and whole and not mixes(function, call.arguments) else None


def mixes(function: Callable[..., Any], arguments: dict[str, Any]) -> bool:
    """Whether a batch norm takes its statistics from the batch."""
    return function is F.batch_norm and (bool(arguments.get("training")) or arguments.get("running_mean") is None)
