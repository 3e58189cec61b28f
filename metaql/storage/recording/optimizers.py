"""What a store keeps about an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metaql.errors import RecordingError

# How the optimizer is carried out, not what it computes.
_NOT_SETTINGS = ("params", "param_names", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")
_STEP_SETTINGS = ("momentum", "dampening", "nesterov", "maximize", "weight_decay")


def checkpoint_settings(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer's settings with ``lr`` as ``learning_rate``; a list, one for each group, where groups differ."""
    _require_groups(optimizer)
    settings: dict[str, Any] = {}
    for name in optimizer.param_groups[0]:
        if name not in _NOT_SETTINGS:
            values = [_plain(group.get(name)) for group in optimizer.param_groups]
            key = "learning_rate" if name == "lr" else name
            settings[key] = values[0] if all(value == values[0] for value in values) else values
    return settings


def step_settings(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """A row of the ``steps`` relation for each parameter group, as the optimizer's next update will use it."""
    _require_groups(optimizer)
    return [
        {
            "parameter_group": number,
            "learning_rate": _plain(group["lr"]),
            **{name: _plain(group.get(name)) for name in _STEP_SETTINGS},
            "buffer_fresh": _is_fresh(optimizer, group),
        }
        for number, group in enumerate(optimizer.param_groups)
    ]


def _require_groups(optimizer: Any) -> None:
    if not hasattr(optimizer, "param_groups"):
        raise RecordingError(
            f"optimizer is a {type(optimizer).__name__}. Pass the torch.optim.Optimizer that trains the model, whose "
            "settings are kept beside the gradients."
        )


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside of what a trainer has put around it."""
    _require_groups(optimizer)
    for name in ("optimizer", "_optimizer"):
        inner = getattr(optimizer, name, None)
        if isinstance(inner, torch.optim.Optimizer) and inner is not optimizer:
            return plain_optimizer(inner)
    return optimizer  # type: ignore[no-any-return]


def optimizer_name(optimizer: torch.optim.Optimizer) -> str:
    """The class that makes the update: by its name alone if it is PyTorch's."""
    owner = next(each for each in type(optimizer).__mro__ if "step" in vars(each))
    return owner.__name__ if owner.__module__.startswith("torch.optim.") else f"{owner.__module__}.{owner.__qualname__}"


def _is_fresh(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether the next update starts its momentum buffers anew (or has none)."""
    return all(optimizer.state.get(each, {}).get("momentum_buffer") is None for each in group["params"])


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value
