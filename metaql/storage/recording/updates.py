"""Which updates of the optimizer the passes of a trajectory went into, and with what settings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metaql.storage.recording.optimizers import optimizer_name, plain_optimizer, step_settings

# So many numbers of each gradient show whether it was scaled between the backward pass and the update.
_SHOWN = 1024
_ROUNDING = 1e-3

Row = dict[str, Any]


class Updates:
    """Rows of the ``steps`` relation, one for each pass and parameter group.

    An optimizer is watched from its first pass on. Each of its updates gives the passes whose gradients it used their
    update's number, settings and gradient factor; an update without any pass has rows of its own. ``made`` counts the
    updates so far, those of earlier runs included.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], made: int) -> None:
        self.made = made
        self.rows: list[Row] = []
        self._parameters = parameters
        self._optimizer: torch.optim.Optimizer | None = None
        self._handles: list[Any] = []
        self._waiting: list[list[Row]] = []
        self._scale = 1.0
        self._shown: Tensor | None = None
        self._settings: list[Row] = []
        self._factor: float | None = None

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Listens to the optimizer from now on, and to no other."""
        plain = plain_optimizer(optimizer)
        if plain is self._optimizer:
            return
        self.stop()
        self._optimizer = plain
        self._handles = [
            plain.register_step_pre_hook(lambda *_: self._before_update()),
            plain.register_step_post_hook(lambda *_: self._after_update()),
        ]

    def stop(self) -> None:
        """Listens no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    @contextmanager
    def around_pass(self) -> Iterator[None]:
        """Within it a backward pass may run: if it begins with no gradients, those before it came to nothing."""
        handles: list[Any] = []
        if self._waiting:
            handles += [each.register_hook(self._note_beginning(each, handles)) for each in self._parameters.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add_pass(self, common: Row, scale: float) -> None:
        """Takes down a pass that is over; ``scale`` is the factor that a GradScaler put on its loss."""
        assert self._optimizer is not None
        rows = [self._row(settings, common) for settings in step_settings(self._optimizer)]
        self.rows += rows
        self._waiting.append(rows)
        self._scale, self._shown = scale, _shown(self._parameters.values())

    @property
    def groups(self) -> list[list[str]]:
        """The recorded parameters of each group of the optimizer that is watched."""
        assert self._optimizer is not None
        names = {id(each): name for name, each in self._parameters.items()}
        return [
            [names[id(each)] for each in group["params"] if id(each) in names] for group in self._optimizer.param_groups
        ]

    def take(self) -> list[Row]:
        """The rows so far; those of passes that wait come again once their update is made."""
        rows, self.rows = [dict(row) for row in self.rows], [row for rows in self._waiting for row in rows]
        return rows

    def _row(self, settings: Row, common: Row) -> Row:
        assert self._optimizer is not None
        name = optimizer_name(self._optimizer)
        return {**settings, **common, "optimizer": name, "updates": self.made, "update": None, "gradient_factor": None}

    def _note_beginning(self, parameter: nn.Parameter, handles: list[Any]) -> Any:
        def note(_: Tensor) -> None:
            if not handles:
                return
            if parameter.grad is None or not bool(parameter.grad.any()):
                self._waiting = []
            for handle in handles:
                handle.remove()
            handles.clear()

        return note

    def _before_update(self) -> None:
        assert self._optimizer is not None
        self._settings = step_settings(self._optimizer)
        self._factor = self._compared()

    def _after_update(self) -> None:
        self.made += 1
        if self._shown is not None:
            # The pass ran within the update, which called it as its closure.
            self._factor = self._compared()
        about = {"update": self.made, "gradient_factor": self._factor}
        for rows in self._waiting or [self._unseen()]:
            for row, settings in zip(rows, self._settings, strict=True):
                row.update(settings, **about)
        self._waiting = []

    def _compared(self) -> float | None:
        """What the gradients were multiplied with since the last pass, a GradScaler's factor taken off."""
        shown, self._shown = self._shown, None
        ratio = None if shown is None else _ratio(shown, _shown(self._parameters.values()))
        return None if ratio is None else ratio * self._scale

    def _unseen(self) -> list[Row]:
        """The rows of an update that no pass was seen of."""
        none = dict.fromkeys(("step", "batch_size", "reduction", "sample_factor"))
        rows = [self._row(settings, {**none, "updates": self.made - 1}) for settings in self._settings]
        self.rows += rows
        return rows


def _shown(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Some numbers of the gradients as they are now, float64 on the CPU."""
    gradients = (each.grad.detach() for each in parameters if each.grad is not None)
    parts = [(each._values() if each.is_sparse else each).flatten()[:_SHOWN] for each in gradients]
    # Of one device and type, as nearly all are, they are brought over at once.
    alike = len({(each.device, each.dtype) for each in parts}) == 1
    return torch.cat(parts if alike else [each.double().cpu() for each in parts]).double().cpu() if parts else None


def _ratio(before: Tensor, after: Tensor | None) -> float | None:
    """By what all gradients were multiplied in between; None where something else happened to them."""
    if after is None or after.shape != before.shape:
        return None
    if torch.equal(before, after):
        return 1.0
    ratio = float(before @ after / (before @ before))
    apart = float((after - ratio * before).norm())
    return ratio if apart <= _ROUNDING * float(after.norm()) else None
