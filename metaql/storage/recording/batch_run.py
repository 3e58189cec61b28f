"""One batch through the model and back: the operations seen on the way, and what came back to each of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from metaql.storage.recording.capture import Capture
from metaql.storage.recording.layer_outputs import LayerOutputs
from metaql.storage.recording.losses import ModelLosses, require_one_per_sample
from metaql.storage.recording.self_check import coarsest

Signature = tuple[Any, ...]


@dataclass(frozen=True)
class BatchRun:
    """A forward pass, its losses ``values`` [n], and what the backward pass of their sum brought to each operation.

    ``function`` gives the losses of any batch, ``parameters`` are those to record. ``dys`` has dC/dy for each of
    ``capture.uses``. ``unseen`` says of each parameter that no watched function was called with whether the losses
    depend on it all the same. ``hidden`` is set where operations ran out of sight.
    """

    function: ModelLosses
    parameters: Mapping[str, torch.nn.Parameter]
    batch: Any
    samples: int
    values: Tensor
    logits: Tensor | None
    capture: Capture
    dys: Sequence[Tensor | None]
    unseen: Mapping[str, bool]
    hidden: bool

    @property
    def signature(self) -> Signature:
        """All that alignments and routes depend on."""
        uses = tuple(
            (use.weight, use.bias, use.use.operation.kind, use.leading, use.use.geometry, dy is None)
            for use, dy in zip(self.capture.uses, self.dys, strict=True)
        )
        others = frozenset(self.capture.other), frozenset(self.unseen.items())
        return self.samples, self.hidden, uses, *others, self.capture.rows.path

    @cached_property
    def precision(self) -> torch.dtype:
        """The coarsest type that gradients pass through."""
        return coarsest(self.values)

    @property
    def edges(self) -> list[GradientEdge]:
        """Where dC/dy of each captured operation passes."""
        return [use.edge for use in self.capture.uses]

    def some(self, names: set[str]) -> dict[str, torch.nn.Parameter]:
        """Those of the parameters that have these names."""
        return {name: parameter for name, parameter in self.parameters.items() if name in names}


def run_batch(
    function: ModelLosses,
    parameters: Mapping[str, torch.nn.Parameter],
    batch: Any,
    samples: int,
    watched: LayerOutputs | None,
) -> BatchRun:
    """Runs the batch of so many samples; the outputs of ``watched`` modules are noted there."""
    constants = [*function.parameters(), *function.buffers()]
    capture = Capture(parameters, samples, constants, follow_all=watched is not None)
    with capture, nullcontext() if watched is None else watched.watching():
        result = function.evaluate(batch)
    require_one_per_sample(result.values, samples)
    logits = None if result.logits is None else result.logits.detach()
    seen = {name for use in capture.uses for name in (use.weight, use.bias)} | set(capture.other)
    unseen = [name for name in parameters if name not in seen]
    targets = [*(use.edge for use in capture.uses), *(parameters[name] for name in unseen)]
    try:
        gradients = backward(result.values.sum(), targets)
    except RuntimeError as error:
        if "heckpoint" not in str(error):
            raise
        # Reentrant activation checkpointing runs its operations out of sight, and refuses this call.
        gradients, hidden = [None] * len(targets), True
        found = dict.fromkeys(unseen, True)
    else:
        hidden = False
        for use in capture.uses:
            use.require_unchanged()
        found = {name: each is not None for name, each in zip(unseen, gradients[len(capture.uses) :], strict=True)}
    dys = gradients[: len(capture.uses)]
    return BatchRun(function, parameters, batch, samples, result.values, logits, capture, dys, found, hidden)


def backward(loss: Tensor, targets: Sequence[Any]) -> Sequence[Tensor | None]:
    """The loss' gradient at each target, None where it does not depend on it; the graph is kept."""
    if not targets:
        return ()
    return torch.autograd.grad(loss, targets, retain_graph=True, allow_unused=True)
