"""Convolutions in one, two and three dimensions: a linear map on the patches of the input.

Padding modes other than zeros are applied to the input before the convolution is called, so they need
nothing here; a module used on inputs of several sizes is several uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaql.storage.patches import unfold
from metaql.storage.recording.operations.operation import Operation, Use
from metaql.storage.schema import Unfold

Size = int | Sequence[int]


def _suffix(use: Use, dy: Tensor) -> Tensor:
    assert use.geometry is not None
    return unfold(use.geometry, use.inputs)


def _prefix(use: Use, dy: Tensor) -> Tensor:
    return dy.flatten(2).transpose(1, 2)


CONVOLUTION = Operation("conv", _suffix, _prefix)


def convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
) -> list[Use]:
    """The use in a call of ``F.conv1d``, ``conv2d`` or ``conv3d``; an input without a batch dimension is left."""
    if input.dim() != weight.dim():
        return []
    kernel = tuple(weight.shape[2:])
    dilations = each(dilation, kernel)
    geometry = Unfold(
        tuple(input.shape[1:]), kernel, each(stride, kernel), _padding(padding, kernel, dilations), dilations
    )
    return [Use(CONVOLUTION, input, weight, bias, (0,), groups, geometry=geometry)]


def each(size: Size, kernel: tuple[int, ...]) -> tuple[int, ...]:
    """One number for each of the kernel's dimensions."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * len(kernel) if len(sizes) == 1 else sizes


def _padding(padding: Size | str, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if padding == "same":
        # torch puts the odd one at the end.
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    assert not isinstance(padding, str)
    return tuple((amount, amount) for amount in each(padding, kernel))


FUNCTIONS = {torch.conv1d: convolution, torch.conv2d: convolution, torch.conv3d: convolution}
