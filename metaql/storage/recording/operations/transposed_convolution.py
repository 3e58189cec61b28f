"""Transposed convolutions: a convolution from the output back to the input, with the same weight.

So the factors of a convolution have their roles exchanged: the prefix is the input at a position, the suffix the
patch of dC/dy that this position was spread over. The bias is a use of its own, the sum of dC/dy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.storage.patches import unfold
from metaql.storage.recording.operations.convolution import Size, each
from metaql.storage.recording.operations.elementwise import added
from metaql.storage.recording.operations.operation import Operation, Use
from metaql.storage.schema import Unfold


def _patches(use: Use, dy: Tensor) -> Tensor:
    assert use.geometry is not None
    return unfold(use.geometry, dy)


def _inputs(use: Use, dy: Tensor) -> Tensor:
    return use.inputs.detach().to(dy.dtype).flatten(2).transpose(1, 2)


TRANSPOSED_CONVOLUTION = Operation("conv", _patches, _inputs, kept=lambda use, dy: dy)


def transposed_convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> list[Use]:
    """The uses in a call of ``F.conv_transpose1d``, ``2d`` or ``3d``; one without a batch dimension is left."""
    kernel = tuple(weight.shape[2:])
    strides, pads, extra, dilations = (each(size, kernel) for size in (stride, padding, output_padding, dilation))
    if input.dim() != weight.dim() or any(more >= step for more, step in zip(extra, strides, strict=True)):
        # Such an end of the output would be patches of no input.
        return []
    sizes = [
        (size - 1) * step - 2 * pad + spread * (width - 1) + more + 1
        for size, step, pad, spread, width, more in zip(
            input.shape[2:], strides, pads, dilations, kernel, extra, strict=True
        )
    ]
    shape = (groups * weight.shape[1], *sizes)
    geometry = Unfold(shape, kernel, strides, tuple((pad, pad) for pad in pads), dilations)
    use = Use(TRANSPOSED_CONVOLUTION, input, weight, None, (0,), groups, geometry=geometry)
    if bias is None:
        return [use]
    return [use, *added(bias, input, (len(input), *shape), tuple(bias.shape) + (1,) * len(kernel))]


FUNCTIONS = {
    torch.conv_transpose1d: transposed_convolution,
    torch.conv_transpose2d: transposed_convolution,
    torch.conv_transpose3d: transposed_convolution,
}
