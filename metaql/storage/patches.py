"""The patches of its input that a convolution multiplies with its weight, and their products with gradients.

Letters: n samples, s positions, g groups, i one group's input width (channels times the kernel's size), o one group's
output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from metaql.storage.schema import Unfold

# Bytes of patches that a processor makes at a time, so that its caches still have them when they are multiplied.
_TOGETHER = 3 << 19


def unfold(geometry: Unfold, inputs: Tensor) -> Tensor:
    """The patches a convolution sees: inputs [n, channels, *spatial] => [n, s, g·i], in the order of its output.

    A view of [n, g·i, s], in which runs of pixels stay together: copying them so is several times faster.
    """
    patches = _patches(geometry, inputs)
    # Said in numbers: of no inputs torch can't tell how many positions they have.
    width, positions = inputs.shape[1] * prod(geometry.kernel), prod(_outputs(geometry, patches))
    return patches.reshape(len(inputs), width, positions).transpose(1, 2)


def multiply_patches(geometry: Unfold, groups: int, columns: Tensor, inputs: Tensor, out: Tensor) -> None:
    """Writes Σ_s of the products of columns [n, g·o, s] and patches of inputs [n, elements] into ``out``, [n, g·o, i].

    For each sample, that is: a convolution's own gradients, in the way that is the faster one for its size.
    """
    inputs = inputs.reshape(len(columns), *geometry.input_shape)
    if _smaller_than_factors(columns, inputs, out):
        out.copy_(_by_convolution(geometry, groups, columns, inputs, out))
    else:
        _by_patches(geometry, groups, columns, inputs, out)


def _smaller_than_factors(columns: Tensor, inputs: Tensor, out: Tensor) -> bool:
    """Whether images are so large and channels so few that making patches takes a processor most of the time.

    There a convolution, which makes none, takes half as long or less. Elsewhere, with many channels and small images,
    it takes up to fifteen times as long as patches and their products.
    """
    return inputs.device.type == "cpu" and 0 < out.numel() < inputs.numel() + columns.numel()


def _by_convolution(geometry: Unfold, groups: int, columns: Tensor, inputs: Tensor, out: Tensor) -> Tensor:
    """The gradient of a convolution that has every group of every sample for a group of its own: shaped as ``out``."""
    n, outputs, width = out.shape
    spatial = _outputs(geometry, _patches(geometry, inputs))
    even = all(before == after for before, after in geometry.padding)
    inputs = inputs if even else _padded(geometry, inputs)
    gradient = _WEIGHT_GRADIENTS[len(spatial)](
        inputs.reshape(1, -1, *inputs.shape[2:]),
        (n * outputs, width // prod(geometry.kernel), *geometry.kernel),
        columns.reshape(1, -1, *spatial),
        geometry.stride,
        tuple(before for before, _ in geometry.padding) if even else 0,
        geometry.dilation,
        n * groups,
    )
    return gradient.reshape(out.shape)


_WEIGHT_GRADIENTS: Mapping[int, Callable[..., Tensor]] = {1: conv1d_weight, 2: conv2d_weight, 3: conv3d_weight}


def _by_patches(geometry: Unfold, groups: int, columns: Tensor, inputs: Tensor, out: Tensor) -> None:
    """A few patches at a time: faster than all at once, and in less room."""
    n, outputs, _ = columns.shape
    patches = _patches(geometry, inputs)
    lines, *across = _outputs(geometry, patches)
    width, line = groups * out.shape[2], prod(across)
    room = inputs.new_empty(0)
    for samples, some in _steps(n, lines, inputs.itemsize * width * line if inputs.device.type == "cpu" else 0):
        part = patches[samples].narrow(-len(geometry.kernel), some.start, some.stop - some.start)
        room = part.new_empty(part.numel()) if room.numel() < part.numel() else room
        made = room[: part.numel()]
        made.view(part.shape).copy_(part)
        right = made.view(len(part) * groups, out.shape[2], -1).transpose(1, 2)
        left = columns[samples, :, some.start * line : some.stop * line]
        left = left.reshape(len(part) * groups, outputs // groups, -1)
        _add_products(left, right, out[samples], begun=some.start > 0)


def _add_products(left: Tensor, right: Tensor, out: Tensor, begun: bool) -> None:
    """left [n·g, o, s] @ right [n·g, s, i], added to ``out`` [n, g·o, i] if that is begun."""
    if len(left) == len(out):
        # Where they belong at once: a copy takes as long as the products.
        torch.baddbmm(out, left, right, beta=int(begun), out=out)
        return
    products = torch.bmm(left, right).view(out.shape)
    if begun:
        out.add_(products)
    else:
        out.copy_(products)


def _steps(samples: int, lines: int, size: int) -> Iterator[tuple[slice, slice]]:
    """Some samples, or some lines of one, whose patches of ``size`` bytes a line are made together."""
    fitting = max(1, _TOGETHER // size) if size else samples * lines
    each = max(1, fitting // lines)
    # As many lines in each step: the products of a few left over are slow.
    height = ceil(lines / ceil(lines / min(fitting, lines)))
    for begin in range(0, samples, each):
        for line in range(0, lines, height):
            yield slice(begin, min(begin + each, samples)), slice(line, min(line + height, lines))


def _outputs(geometry: Unfold, patches: Tensor) -> tuple[int, ...]:
    """The spatial shape of a convolution's output: its positions."""
    return tuple(patches.shape[-len(geometry.kernel) :])


def _patches(geometry: Unfold, inputs: Tensor) -> Tensor:
    """A view of inputs, padded, as patches: [n, channels, *kernel, *spatial]."""
    patches = _padded(geometry, inputs)
    dimensions = len(geometry.kernel)
    for axis, (size, stride, dilation) in enumerate(
        zip(geometry.kernel, geometry.stride, geometry.dilation, strict=True)
    ):
        patches = patches.unfold(2 + axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    spatial = tuple(range(2, 2 + dimensions))
    kernel = tuple(range(2 + dimensions, 2 + 2 * dimensions))
    return patches.permute(0, 1, *kernel, *spatial)


def _padded(geometry: Unfold, inputs: Tensor) -> Tensor:
    pads = [amount for pair in reversed(geometry.padding) for amount in pair]
    return torch.nn.functional.pad(inputs, pads) if any(pads) else inputs
