"""What the callbacks share: the arguments they are made with, and one recording at a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from metaql.errors import RecordingError
from metaql.storage.recording.losses import LossFunction
from metaql.storage.recording.recorder import Recorder
from metaql.storage.recording.wrappers import distributed

WHEN = ("end", "epoch", "save")


class Recording:
    """Opens the store for each recording and closes it after it, so that a training that fails leaves no lock."""

    def __init__(
        self,
        path: str | Path,
        losses: LossFunction | None,
        layers: Sequence[str] | str | None,
        dtype: str,
        inputs: bool,
        overwrite: bool,
        when: str,
    ) -> None:
        if when not in WHEN:
            raise RecordingError(f"when can be {', '.join(map(repr, WHEN))}; not {when!r}.")
        self.when = when
        self.losses = losses
        self._path = path
        self._arguments: dict[str, Any] = {"layers": layers, "dtype": dtype, "inputs": inputs}
        self._overwrite = overwrite
        self._at: Any = None

    def begin(self, model: nn.Module, losses: LossFunction | None) -> None:
        """Raises what would keep the recording from being made, while nothing has been trained yet."""
        self._at = None
        self._open(model, losses).close()

    def record(
        self,
        model: nn.Module,
        losses: LossFunction | None,
        splits: Mapping[str, Iterable[Any]],
        settings: Mapping[str, Any],
    ) -> None:
        """A checkpoint with the settings, and a collection of each split; nothing if this step was recorded already."""
        if settings["step"] == self._at:
            return
        with self._open(model, losses) as recorder:
            recorder.checkpoint(**settings)
            for split, batches in splits.items():
                recorder.collect(batches, split)
        self._at = settings["step"]

    def _open(self, model: nn.Module, losses: LossFunction | None) -> Recorder:
        recorder = Recorder(model, self._path, losses=losses, overwrite=self._overwrite, **self._arguments)
        # A later training with the same callback goes on where this one ends.
        self._overwrite = False
        return recorder


def warn_of_half_precision() -> None:
    """float16 keeps no number below 6e-8, which is why trainings in it scale their losses."""
    warnings.warn(
        "Recording in float16: what is below 6e-8 in a backward pass becomes zero there, since the samples' own losses "
        "are not scaled as the training's is. bfloat16 has no such limit.",
        stacklevel=3,
    )


def require_known_processes(model: nn.Module, count: int) -> None:
    """Raises where several processes train together in a way that the recorder does not see."""
    if count > 1 and distributed(model) is None:
        raise RecordingError(
            f"{count} processes train this model together, but not by DistributedDataParallel, which is what can be "
            "recorded. Train with it, or record afterwards with metaql.Recorder."
        )
