"""The model's side of a recording: which parameters train, and whether their gradients are well defined now."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from metaql.errors import ModelStateError, RecordingError, UnknownNameError, UnsupportedParameterError


def trainable(model: nn.Module, patterns: Sequence[str] | str | None) -> dict[str, nn.Parameter]:
    """name => parameter for all that train, or those that match a pattern.

    A pattern is a shell glob over names such as ``fc1.weight``; a module's name stands for all its parameters.
    """
    if not isinstance(model, nn.Module):
        raise RecordingError(f"model must be a torch.nn.Module, not a {type(model).__name__}.")
    everything = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for name, each in everything.items():
        if each.is_complex():
            raise UnsupportedParameterError(
                f"Parameter '{name}' is complex, and a store keeps real numbers. Leave it out with "
                "requires_grad_(False), or keep its real and imaginary parts as two parameters."
            )
        if isinstance(each, nn.UninitializedParameter):
            raise ModelStateError(f"Parameter '{name}' has no shape yet. Run the lazy model once first.")
    # A parameter without elements has no gradient to keep.
    everything = {name: each for name, each in everything.items() if each.numel()}
    if not everything:
        raise ModelStateError("The model has no trainable parameter (requires_grad is False for all).")
    if patterns is None:
        return everything
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns or not all(isinstance(pattern, str) for pattern in patterns):
        raise RecordingError(
            f"layers is a list of patterns of parameter names, such as ['fc1', '*.bias'], not {patterns!r}. Leave it "
            "out to record every parameter."
        )
    for pattern in patterns:
        if not any(_matches(name, pattern) for name in everything):
            raise UnknownNameError(
                f"layers: no trainable parameter matches '{pattern}'. The parameters are: {', '.join(everything)}."
            )
    return {name: each for name, each in everything.items() if any(_matches(name, each_) for each_ in patterns)}


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def require_values(model: nn.Module) -> None:
    """Raises if a part of the model is on the meta device."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ModelStateError(
                f"'{name}' is on the meta device, where it has no values. Load the whole model before it is recorded."
            )


def require_repeatable(model: nn.Module) -> None:
    """Raises if a module mixes samples or draws random numbers in the mode it is in."""
    mixing = [name for name, module in model.named_modules() if module.training and _mixes(module)]
    random = [name for name, module in model.named_modules() if module.training and _is_random(module)]
    if mixing:
        raise ModelStateError(
            f"{_listed(mixing)} in training mode: batch norm mixes the samples of a batch, so none has a gradient of "
            "its own. Call model.eval() before collect."
        )
    if random:
        raise ModelStateError(
            f"{_listed(random)} in training mode: dropout makes a gradient unrepeatable. Call model.eval() before "
            "collect."
        )


def mixes_samples(model: nn.Module) -> bool:
    """Whether batch norm in training mode is in the model."""
    return any(module.training and _mixes(module) for module in model.modules())


def unchanging(model: nn.Module) -> list[Tensor]:
    """The model's own tensors that a pass leaves as they are: all but what batch norm counts and averages."""
    modules = [module for module in model.modules() if not _mixes(module)]
    buffers = [each for module in modules for each in module.buffers(recurse=False)]
    return [*model.parameters(), *buffers]


def _mixes(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _is_random(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    # Recurrent layers and attention have a dropout of their own; RReLU draws its slopes.
    own = getattr(module, "dropout", 0.0)
    return isinstance(module, nn.RReLU) or (isinstance(own, float) and own > 0)


def _listed(names: list[str]) -> str:
    quoted = ", ".join(f"'{name}'" for name in names[:5]) + (", …" if len(names) > 5 else "")
    return f"{quoted} {'is' if len(names) == 1 else 'are'}"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state on the CPU; tied tensors are tied in the copy as well."""
    copies: dict[tuple[object, ...], Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            identity = (value.data_ptr(), value.shape, value.stride(), value.dtype) if value.numel() else (name,)
            if identity not in copies:
                copies[identity] = value.detach().to("cpu", copy=True)
            state[name] = copies[identity]
    return state


def digest(state: Mapping[str, Any]) -> str:
    """A checksum of the names, shapes and values of all tensors, to notice that weights have moved."""
    checksum = 0
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        checksum = zlib.crc32(f"{name} {value.dtype} {tuple(value.shape)}".encode(), checksum)
        checksum = zlib.crc32(value.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"
