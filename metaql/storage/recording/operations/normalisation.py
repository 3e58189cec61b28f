"""y = x̂ · scale + shift, element by element, where x̂ is the input normalised without them.

The suffix is x̂, so the gradient of the scale is Σ_s prefix_s · suffix_s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metaql.storage.recording.operations.operation import Operation, Use, at_least_float32


def _last_dimensions(use: Use, dy: Tensor) -> Tensor:
    """x̂ of layer and RMS normalisation, whose scale runs over the last dimensions."""
    normalise, shape, eps = use.settings
    return _normalised(normalise, use, shape, eps=eps).flatten(len(use.axes))


def _channels_last(use: Use, dy: Tensor) -> Tensor:
    """x̂ of the normalisations whose scale runs over channels, with the channels moved last."""
    normalise, *settings = use.settings
    return _move_channels(_normalised(normalise, use, *settings))


def _move_channels(values: Tensor) -> Tensor:
    return values.unsqueeze(-1).flatten(2).transpose(1, 2)


def _normalised(normalise: Callable[..., Tensor], use: Use, *settings: Any, **keywords: Any) -> Tensor:
    # Under autocast torch normalises half-precision inputs in float32, so the factors are float32 too.
    return normalise(at_least_float32(use.inputs.detach()), *settings, **keywords)


LAST_DIMENSIONS = Operation("norm", _last_dimensions, lambda use, dy: dy.flatten(len(use.axes)))
CHANNELS = Operation("norm", _channels_last, lambda use, dy: _move_channels(dy))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> list[Use]:
    """The use in a call of ``torch.layer_norm``."""
    shape = tuple(normalized_shape)
    settings = (torch.nn.functional.layer_norm, shape, eps)
    return [Use(LAST_DIMENSIONS, input, weight, bias, _leading(input, shape), settings=settings)]


def rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> list[Use]:
    """The use in a call of ``torch.rms_norm``."""
    shape = tuple(normalized_shape)
    settings = (torch.nn.functional.rms_norm, shape, eps)
    return [Use(LAST_DIMENSIONS, input, weight, None, _leading(input, shape), settings=settings)]


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> list[Use]:
    """The use in a call of ``torch.group_norm``."""
    settings = (torch.nn.functional.group_norm, num_groups, None, None, eps)
    return [Use(CHANNELS, input, weight, bias, (0,), settings=settings)]


def batch_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> list[Use]:
    """The use in a call of ``torch.batch_norm``, by the batch's own statistics in training mode."""
    # Training mode also moves the running statistics, which normalising a second time must not do.
    mean, variance = (None, None) if training else (running_mean, running_var)
    settings = (torch.nn.functional.batch_norm, mean, variance, None, None, training, 0.0, eps)
    return [Use(CHANNELS, input, weight, bias, (0,), settings=settings)]


def instance_norm(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> list[Use]:
    """The use in a call of ``torch.instance_norm``."""
    mean, variance = (None, None) if use_input_stats else (running_mean, running_var)
    settings = (torch.nn.functional.instance_norm, mean, variance, None, None, use_input_stats, 0.0, eps)
    return [Use(CHANNELS, input, weight, bias, (0,), settings=settings)]


def _leading(input: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(input.dim() - len(shape)))


FUNCTIONS: dict[Any, Callable[..., list[Use]]] = {
    torch.layer_norm: layer_norm,
    torch.rms_norm: rms_norm,
    torch.group_norm: group_norm,
    torch.batch_norm: batch_norm,
    torch.instance_norm: instance_norm,
}
