"""What a store that is continued asks of what is recorded into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from metaql.errors import ModelStateError, RecordingError
from metaql.storage.manifest import Manifest
from metaql.storage.tables import RELATIONS


def require_same_model(
    manifest: Manifest, path: Path, parameters: Mapping[str, Tensor], losses: str, dtype: str
) -> None:
    """Raises unless the store is empty, or of these parameters, losses and dtype."""
    if not manifest.layers:
        return
    stored = {each.name: each.shape for layer in manifest.layers for each in layer.parameters}
    given = {name: tuple(each.shape) for name, each in parameters.items()}
    for name in {**stored, **given}:
        if stored.get(name) != given.get(name):
            raise ModelStateError(
                f"The store at {path} records another model or other layers: parameter '{name}' is "
                f"{_shape(stored.get(name))} there and {_shape(given.get(name))} here. Use another path, the same "
                "layers=, or overwrite=True to begin anew."
            )
    if manifest.losses != losses:
        raise RecordingError(
            f"The store at {path} records the gradients of '{manifest.losses}', not of '{losses}'. Pass the same "
            "losses=, or overwrite=True to begin anew."
        )
    if manifest.dtype != dtype:
        raise RecordingError(
            f"The store at {path} keeps {manifest.dtype}, not {dtype}. Pass dtype='{manifest.dtype}', or "
            "overwrite=True to begin anew."
        )


def require_split(split: str, manifest: Manifest) -> None:
    """Raises unless SQL can tell a split of this name from relations and from the store's other splits."""
    if not isinstance(split, str) or not split.strip():
        raise RecordingError(f"split is a name such as 'train' or 'validation', not {split!r}.")
    if split.lower() in RELATIONS:
        raise RecordingError(f"A split can't be named '{split}': every store has a relation of that name.")
    for other in {each.split for each in manifest.collections}:
        if other != split and other.lower() == split.lower():
            raise RecordingError(f"There is a split '{other}'; SQL would not tell '{split}' from it. Rename one.")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a scalar"
