"""Which updates of the optimizer the passes of a trajectory went into, and with what settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from metaql.storage.recording.gradient_samples import GradientSample
from metaql.storage.recording.optimizers import optimizer_name, plain_optimizer, step_settings

Row = dict[str, Any]

_REUSED = ", whose gradients were used more than once"


@dataclass
class _Waiting:
    """A pass whose gradients wait for an update; ``factor`` is what they were multiplied with so far, if one number."""

    rows: list[Row]
    factor: float | None = 1.0


class Updates:
    """Rows of the ``steps`` relation, one for each pass and parameter group.

    An optimizer is watched from its first pass on. Each of its updates gives the passes whose gradients it used their
    update's number, settings and gradient factor; an update without any pass has rows of its own. ``made`` counts the
    updates so far, those of earlier runs included.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], made: int) -> None:
        self.made = made
        self.rows: list[Row] = []
        # The recorded parameters of each group of the optimizers so far; None when they were not of one kind.
        self.groups: list[list[str]] | None = []
        self._parameters = parameters
        self._optimizer: torch.optim.Optimizer | None = None
        self._earlier: WeakSet[torch.optim.Optimizer] = WeakSet()
        self._remark = ""
        self._handles: list[Any] = []
        self._waiting: list[_Waiting] = []
        self._scale = 1.0
        self._sample: GradientSample | None = None
        self._used: GradientSample | None = None
        # Of the update that is being made: each group's settings, and whether it changes the group at all.
        self._settings: list[Row] = []
        self._updated: list[bool] = []
        self._reuses = False
        self._seen: set[str] = set()

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Listens to the optimizer from now on, and to no other."""
        plain = plain_optimizer(optimizer)
        if plain is not self._optimizer:
            if plain in self._earlier:
                self._remark = ", taking turns with another optimizer"
            self._earlier.add(plain)
            self._waiting, self._sample, self._used = [], None, None
        self.stop()
        self._optimizer = plain
        # Anew for each pass, so that hooks of the user's come first.
        self._handles = [
            plain.register_step_pre_hook(lambda *_: self._before_update()),
            plain.register_step_post_hook(lambda *_: self._after_update()),
        ]
        self._note_groups(plain)

    def stop(self) -> None:
        """Listens no more."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer = [], None

    @contextmanager
    def around_pass(self) -> Iterator[None]:
        """Within it a backward pass may run, whose gradients come to those that are there when it begins."""
        handles: list[Any] = []

        def begin(_: Tensor) -> None:
            if handles:
                self._begin()
            for handle in handles:
                handle.remove()
            handles.clear()

        handles += [each.register_hook(begin) for each in self._parameters.values()]
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
        self._waiting.append(_Waiting(rows))
        self._scale, self._sample = scale, GradientSample.of(self._own)

    def take(self) -> list[Row]:
        """The rows so far; those of passes that wait come again once their update is made."""
        rows, self.rows = [dict(row) for row in self.rows], [row for each in self._waiting for row in each.rows]
        return rows

    @property
    def _own(self) -> dict[str, nn.Parameter]:
        """The recorded parameters that the optimizer updates."""
        assert self._optimizer is not None
        theirs = {id(each) for group in self._optimizer.param_groups for each in group["params"]}
        return {name: each for name, each in self._parameters.items() if id(each) in theirs}

    def _note_groups(self, optimizer: torch.optim.Optimizer) -> None:
        names = {id(each): name for name, each in self._parameters.items()}
        now = [[names[id(each)] for each in group["params"] if id(each) in names] for group in optimizer.param_groups]
        if self.groups is not None:
            # Groups may be added, as layers are thawed.
            self.groups = now if now[: len(self.groups)] == self.groups else None

    def _row(self, settings: Row, common: Row) -> Row:
        assert self._optimizer is not None
        name = optimizer_name(self._optimizer) + self._remark
        return {**settings, **common, "optimizer": name, "updates": self.made, "update": None, "gradient_factor": None}

    def _begin(self) -> None:
        """What became of the gradients so far, now that a pass adds to those that are there."""
        own = self._own
        if GradientSample.of(own) is None:
            self._waiting = []
        elif self._sample is not None:
            self._multiply(self._sample.factor(own))
        elif self._are_used(own):
            self._remark = _REUSED
        self._sample = self._used = None
        self._reuses = False

    def _are_used(self, own: Mapping[str, nn.Parameter]) -> bool:
        """Whether the gradients are those that an update has used; the next one uses them too if nobody clears them."""
        return self._used is not None and self._used.factor(own) is not None

    def _before_update(self) -> None:
        assert self._optimizer is not None
        own = self._own
        self._settings, self._updated = step_settings(self._optimizer), []
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            members = {id(each) for each in group["params"]}
            of_group = {name: each for name, each in own.items() if id(each) in members}
            settings["buffer_fresh"], is_updated = self._state_of(of_group)
            self._updated.append(is_updated)
        if self._sample is not None:
            # A fused update takes the GradScaler's factor off by itself.
            inside = getattr(self._optimizer, "grad_scale", None)
            self._take_factor(self._scale / (1.0 if inside is None else float(inside)))
        else:
            # Unless a closure begins anew.
            self._reuses = self._are_used(own)
        self._used = GradientSample.of(own)

    def _after_update(self) -> None:
        assert self._optimizer is not None
        skipped = getattr(self._optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            self._waiting = []
            return
        if self._sample is not None:
            # The pass ran within the update, which called it as its closure.
            self._take_factor(self._scale)
        if self._reuses:
            self._remark, self._reuses = _REUSED, False
        # Of an update that had begun when the first pass came nothing else is known.
        settings = self._settings or [{**each, "buffer_fresh": None} for each in step_settings(self._optimizer)]
        updated = self._updated or [True] * len(settings)
        self.made, self._settings, self._updated = self.made + 1, [], []
        for one in self._waiting or [self._unseen(settings)]:
            for row, own_settings, is_updated in zip(one.rows, settings, updated, strict=False):
                row.update(own_settings, update=self.made if is_updated else None, gradient_factor=one.factor)
        self._waiting = []

    def _take_factor(self, scale: float) -> None:
        """What the gradients were multiplied with since the last pass, times a number."""
        assert self._sample is not None
        found = self._sample.factor(self._own)
        self._multiply(None if found is None else found * scale)
        self._sample = None

    def _multiply(self, factor: float | None) -> None:
        for one in self._waiting:
            one.factor = None if one.factor is None or factor is None else one.factor * factor

    def _state_of(self, own: Mapping[str, nn.Parameter]) -> tuple[bool | None, bool]:
        """Whether the group's momentum buffers start anew with this update, and whether it updates the group at all.

        Only recorded parameters count that had gradients before or have them now. The first is None where they differ:
        some have a gradient or a buffer, and others have none.
        """
        assert self._optimizer is not None
        state = self._optimizer.state
        now = {name: each for name, each in own.items() if each.grad is not None}
        left_out = (self._seen & own.keys()) - now.keys()
        self._seen |= now.keys()
        buffers = {state.get(each, {}).get("momentum_buffer") is not None for each in now.values()}
        if len(buffers) > 1 or (now and left_out):
            return None, True
        return not any(buffers), bool(now) or not own

    def _unseen(self, settings: list[Row]) -> _Waiting:
        """The rows of an update that no pass was seen of."""
        none = dict.fromkeys(("step", "batch_size", "reduction", "sample_factor"))
        rows = [self._row(each, {**none, "updates": self.made - 1}) for each in settings]
        self.rows += rows
        return _Waiting(rows, None)
