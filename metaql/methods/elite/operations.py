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
    """A function's arguments, and where the parameters and the axes of samples are among them."""

    names: tuple[str, ...]
    input_dims: int | None = None
    transposed: bool = False
    convolution: bool = False


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def _convolutions() -> dict[Callable[..., Any], Operation]:
    found: dict[Callable[..., Any], Operation] = {}
    for dims in (1, 2, 3):
        found[getattr(torch, f"conv{dims}d")] = Operation(_CONVOLUTION, dims + 2, convolution=True)
        found[getattr(torch, f"conv_transpose{dims}d")] = Operation(_TRANSPOSED, dims + 2, True, convolution=True)
    return found


OPERATIONS: dict[Callable[..., Any], Operation] = {
    F.linear: Operation(("input", "weight", "bias")),
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

    def along(self, weight: Tensor | None, bias: Tensor | None, rows: slice) -> Tensor:
        """The derivative of the output's ``rows`` along a direction of weight and bias; None is zero."""
        own = self.arguments["weight"]
        arguments = self.arguments | {
            "input": self.inputs.detach()[rows],
            "weight": torch.zeros_like(own) if weight is None else weight,
            "bias": bias,
        }
        output: Tensor = self.function(**arguments)
        return output

    def gradient(self, dy: Tensor, rows: slice, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weight and bias, where ``needs`` says so, from ∂/∂y of the ``rows``, summed over them."""
        inputs = self.inputs.detach()[rows]
        operation = OPERATIONS[self.function]
        if operation.convolution and not isinstance(self.arguments.get("padding"), str):
            return self._convolution_gradient(inputs, dy, needs)
        if self.function is F.linear:
            flat = dy.reshape(-1, dy.shape[-1])
            weight = flat.T @ inputs.reshape(-1, inputs.shape[-1]) if needs[0] else None
            return weight, flat.sum(0) if needs[1] else None
        return self._gradient_by_autograd(inputs, dy, needs)

    def _convolution_gradient(
        self, inputs: Tensor, dy: Tensor, needs: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        operation = OPERATIONS[self.function]
        weight = self.arguments["weight"].detach()
        dims = inputs.ndim - 2
        stride, padding, dilation, extra = (
            _each(self.arguments.get(name, usual), dims)
            for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0))
        )
        sizes = [dy.shape[1]] if needs[1] else None
        _, dW, db = torch.ops.aten.convolution_backward(
            dy, inputs, weight, sizes, stride, padding, dilation, operation.transposed, extra,
            self.arguments.get("groups", 1), [False, *needs],
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
