"""y = x Wᵀ + b and y = x W, on any number of leading dimensions, with all of a matrix or a part of it.

Of y = x W the gradient is Σ_s x_s dy_sᵀ: the same factors with their roles exchanged. The bias then is a use of
its own, for its gradient still is the sum of dy.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metaql.storage.recording.operations.elementwise import added, dotted
from metaql.storage.recording.operations.operation import Operation, Use
from metaql.storage.recording.operations.views import Rectangle, is_parameter, is_plain, rectangle, root


def _rounded_input(use: Use, dy: Tensor) -> Tensor:
    # Under autocast the operation rounded its input to the type of its output.
    return use.lead(use.inputs.detach()).to(dy.dtype)


def _suffix(use: Use, dy: Tensor) -> Tensor:
    (part,) = use.settings
    assert isinstance(part, Rectangle)
    return part.spread_columns(use.lead(dy) if part.transposed else _rounded_input(use, dy))


def _prefix(use: Use, dy: Tensor) -> Tensor:
    (part,) = use.settings
    assert isinstance(part, Rectangle)
    return part.spread_rows(_rounded_input(use, dy) if part.transposed else use.lead(dy))


def _mark(use: Use) -> Hashable:
    (part,) = use.settings
    assert isinstance(part, Rectangle)
    return None if part.transposed else (LINEAR, part.columns, part.width)


LINEAR = Operation("linear", _suffix, _prefix, suffix_mark=_mark)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Use]:
    """The uses in a call of ``F.linear``."""
    if not is_plain(input, weight):
        return []
    if weight.dim() != 2:
        return dotted(input, weight) if weight.dim() == 1 and bias is None else []
    part = rectangle(weight)
    if part is None:
        return []
    if bias is None:
        return [_use(input, weight, None, part)]
    if not part.transposed and _goes_with(bias, part):
        return [_use(input, weight, root(bias), part)]
    return [_use(input, weight, None, part), *added(bias, input, (*input.shape[:-1], len(weight)))]


def matmul(input: Tensor, other: Tensor, *, out: Tensor | None = None) -> list[Use]:
    """The use in a call of ``torch.matmul`` or ``mm`` by a parameter on the right, or on the left of matrices."""
    if out is not None or not is_plain(input, other) or is_parameter(input) == is_parameter(other):
        return []
    if is_parameter(other) and other.dim() == 1:
        return dotted(input, other)
    matrix = other if is_parameter(other) else input
    part = rectangle(matrix) if matrix.dim() == 2 else None
    if part is None:
        return []
    if matrix is other:
        return [_use(input, matrix, None, replace(part, transposed=not part.transposed))]
    if other.dim() < 2:
        return []
    # Of W x the last dimension holds positions, the one before it the vectors.
    last = other.dim() - 1
    return [replace(_use(other, matrix, None, part), axes=(*range(last - 1), last))]


def addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> list[Use]:
    """The uses in a call of ``torch.addmm``; with factors on its terms it is left to the general way."""
    if beta != 1 or alpha != 1 or out is not None:
        return []
    return [*matmul(mat1, mat2), *added(input, mat1, (mat1.shape[0], mat2.shape[1]))]


def _use(input: Tensor, weight: Tensor, bias: Tensor | None, part: Rectangle) -> Use:
    return Use(LINEAR, input, root(weight), bias, tuple(range(input.dim() - 1)), settings=(part,))


def _goes_with(bias: Tensor, part: Rectangle) -> bool:
    """Whether the bias has the weight's own rows of a vector as long as the weight."""
    whole = root(bias)
    if bias is whole:
        return part.rows == range(part.height) and bias.shape == (part.height,)
    rows = range(bias.storage_offset() - whole.storage_offset(), part.height, bias.stride()[0])
    return whole.shape == (part.height,) and whole.is_contiguous() and part.rows == rows[: len(bias)]


FUNCTIONS: dict[Any, Callable[..., list[Use]]] = {
    torch._C._nn.linear: linear,
    torch.matmul: matmul,
    torch.mm: matmul,
    torch.Tensor.matmul: matmul,
    torch.Tensor.mm: matmul,
    torch.Tensor.__matmul__: matmul,
    torch.addmm: addmm,
    torch.Tensor.addmm: addmm,
}
