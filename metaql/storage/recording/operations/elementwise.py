"""Parameters that are added, multiplied or divided with data element by element, or copied for every sample.

Such a parameter is broadcast: in some of the output's dimensions, its ``axes``, it is the same everywhere, and
there samples and positions are. The prefix is the gradient of the parameter as each of these positions sees it,
and their sum is a sample's gradient, as it is for a bias.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaql.storage.recording.operations.operation import Operation, Use, at_least_float32
from metaql.storage.recording.operations.views import is_parameter, is_plain, places, root

Change = Callable[[Use, Tensor], Tensor]


def _prefix(use: Use, dy: Tensor) -> Tensor:
    """[*axes, elements of the parameter]."""
    change, place = use.settings
    values = use.lead(change(use, at_least_float32(dy)))
    # What is not among the axes are the parameter's own dimensions, in their order.
    values = values.flatten(len(use.axes)) if values.dim() > len(use.axes) else values.unsqueeze(-1)
    return values if place is None else place.spread(values)


def _nothing(use: Use, dy: Tensor) -> Tensor:
    return dy.new_zeros(())


ADDED = Operation("bias", _nothing, _prefix, reads_input=False)
MULTIPLIED = Operation("parameter", _nothing, _prefix)


# What turns dy into the gradient of the parameter at each element.


def _same(use: Use, dy: Tensor) -> Tensor:
    return dy


def _negative(use: Use, dy: Tensor) -> Tensor:
    return -dy


def _times(use: Use, dy: Tensor) -> Tensor:
    return dy * use.inputs.detach()


def _times_each(use: Use, dy: Tensor) -> Tensor:
    return dy.unsqueeze(-1) * use.inputs.detach()


def _over(use: Use, dy: Tensor) -> Tensor:
    return dy / use.inputs.detach()


def _times_negative(use: Use, dy: Tensor) -> Tensor:
    return dy * use.inputs.detach().clamp(max=0)


def added(parameter: Tensor, data: Tensor, shape: Sequence[int], own: Sequence[int] | None = None) -> list[Use]:
    """The use of a parameter as a term of a sum of this shape, beside data; as though it were of its ``own`` shape."""
    return _uses(ADDED, _same, data, parameter, shape, own)


def dotted(data: Tensor, parameter: Tensor) -> list[Use]:
    """The use in the product of data [..., i] and a vector [i]."""
    return _uses(MULTIPLIED, _times_each, data, parameter, data.shape)


def add(input: Any, other: Any, *, alpha: float = 1, out: Tensor | None = None) -> list[Use]:
    """The use in a call of ``torch.add``, also in place."""
    found = _operands(input, other) if alpha == 1 and out is None else None
    return [] if found is None else _uses(ADDED, _same, *found)


def sub(input: Any, other: Any, *, alpha: float = 1, out: Tensor | None = None) -> list[Use]:
    """The use in a call of ``torch.sub``, also in place."""
    found = _operands(input, other) if alpha == 1 and out is None else None
    return [] if found is None else _uses(ADDED, _same if found[1] is input else _negative, *found)


def mul(input: Any, other: Any, *, out: Tensor | None = None) -> list[Use]:
    """The use in a call of ``torch.mul``. In place it overwrites the factor, and is left to the general way."""
    found = _operands(input, other) if out is None else None
    return [] if found is None else _uses(MULTIPLIED, _times, *found)


def div(input: Any, other: Any, *, rounding_mode: str | None = None, out: Tensor | None = None) -> list[Use]:
    """The use in a call of ``torch.div``, of a parameter or by one."""
    found = _operands(input, other) if rounding_mode is None and out is None else None
    if found is None:
        return []
    if found[1] is input:
        return _uses(MULTIPLIED, _over, *found)
    # Of the parameter as it is now: an update may come before the factors are asked for.
    factor = other.detach().square().reciprocal().neg()
    return _uses(MULTIPLIED, lambda use, dy: _times(use, dy) * factor, *found)


def prelu(input: Tensor, weight: Tensor) -> list[Use]:
    """The use in a call of ``torch.prelu``, with one slope or one for each channel."""
    if not is_parameter(weight) or weight.dim() > 1 or (weight.numel() > 1 and input.dim() < 2):
        return []
    shape = weight.shape if weight.numel() == 1 else (len(weight), *[1] * (input.dim() - 2))
    return _uses(MULTIPLIED, _times_negative, input, weight, input.shape, shape)


def expand(input: Tensor, *sizes: Any, **named: Any) -> list[Use]:
    """The use in a call of ``Tensor.expand``, which copies a parameter to every sample."""
    return _copied(input, input.detach().expand(*sizes, **named).shape)


def expand_as(input: Tensor, other: Tensor) -> list[Use]:
    """The use in a call of ``Tensor.expand_as``."""
    return _copied(input, other.shape)


def broadcast_to(input: Tensor, size: Sequence[int]) -> list[Use]:
    """The use in a call of ``torch.broadcast_to``."""
    return _copied(input, input.detach().broadcast_to(size).shape)


def repeat(input: Tensor, *sizes: Any) -> list[Use]:
    """The use in a call of ``Tensor.repeat``, where it copies whole parameters and not elements within them."""
    times = tuple(sizes[0]) if isinstance(sizes[0], Sequence) else sizes
    own = (*[1] * (len(times) - input.dim()), *input.shape)
    if any(size > 1 and each > 1 for size, each in zip(own, times, strict=True)):
        return []
    return _copied(input, tuple(size * each for size, each in zip(own, times, strict=True)))


def _copied(parameter: Tensor, shape: Sequence[int]) -> list[Use]:
    return _uses(ADDED, _same, parameter.detach(), parameter, shape)


def _operands(input: Any, other: Any) -> tuple[Tensor, Tensor, Sequence[int]] | None:
    """Data, a parameter, and the shape of what comes of both; None where it is not one of each."""
    if not isinstance(input, Tensor) or not isinstance(other, Tensor) or is_parameter(input) == is_parameter(other):
        return None
    data, parameter = (input, other) if is_parameter(other) else (other, input)
    return data, parameter, torch.broadcast_shapes(data.shape, parameter.shape)


def _uses(
    operation: Operation,
    change: Change,
    data: Tensor,
    parameter: Tensor,
    shape: Sequence[int],
    own: Sequence[int] | None = None,
) -> list[Use]:
    """The parameter's use, broadcast to ``shape`` from its ``own``; none where no dimension is left for samples."""
    own = tuple(parameter.shape if own is None else own)
    padded = (*[1] * (len(shape) - len(own)), *own)
    axes = tuple(axis for axis, size in enumerate(padded) if size == 1)
    if not axes or not is_parameter(parameter) or not is_plain(data, parameter):
        return []
    return [Use(operation, data, None, root(parameter), axes, settings=(change, places(parameter)))]


FUNCTIONS: dict[Any, Callable[..., list[Use]]] = {
    torch.add: add,
    torch.Tensor.add: add,
    torch.Tensor.add_: add,
    torch.sub: sub,
    torch.Tensor.sub: sub,
    torch.Tensor.sub_: sub,
    torch.mul: mul,
    torch.Tensor.mul: mul,
    torch.div: div,
    torch.Tensor.div: div,
    torch.true_divide: div,
    torch.prelu: prelu,
    torch.Tensor.prelu: prelu,
    torch.Tensor.expand: expand,
    torch.Tensor.expand_as: expand_as,
    torch.broadcast_to: broadcast_to,
    torch.Tensor.broadcast_to: broadcast_to,
    torch.Tensor.repeat: repeat,
}
