"""A trained module and the scaling before it, as tensors by name and back."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.scaling import Scaling

_MODULE = "module."


def taken_apart(module: nn.Module, scaling: Scaling, results: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """All of them, on the CPU; results that are None are left out."""
    tensors = {f"{_MODULE}{name}": value for name, value in module.state_dict().items()}
    tensors |= {"scaling.centre": scaling.centre, "scaling.deviation": scaling.deviation}
    tensors |= {name: value for name, value in results.items() if value is not None}
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def scaling_from(tensors: Mapping[str, Tensor]) -> Scaling:
    """The scaling that ``taken_apart`` was given."""
    return Scaling(tensors["scaling.centre"], tensors["scaling.deviation"])


def load(module: nn.Module, tensors: Mapping[str, Tensor], registered: str) -> None:
    """Puts the weights into a module that was built as the saved one was; QueryError where they don't fit it."""
    state = {name.removeprefix(_MODULE): each for name, each in tensors.items() if name.startswith(_MODULE)}
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise QueryError(
            f"the saved model does not fit the {registered} that is registered now: "
            f"register the one it was trained with ({str(error).splitlines()[-1].strip()})"
        ) from error
