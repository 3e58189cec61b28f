"""How each parameter's gradients are had from all batches of one kind, once that is settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metaql.storage.recording.aligned import AlignedUse
from metaql.storage.recording.alignment import Alignment
from metaql.storage.recording.batch_run import BatchRun
from metaql.storage.recording.replayed import Gradients, by_function, by_loop, within_batch

# How a parameter's gradient is had: from captured operations, by torch.func, by a loop over samples that
# are cut out of the batch or (where that can't be done) differentiated within it; or no loss depends on it.
CAPTURED, FUNCTION, LOOP, WITHIN, UNUSED = "captured", "function", "loop", "within", "unused"


@dataclass(frozen=True)
class Plan:
    """Where the samples are in each captured operation, and the route to each parameter's gradients."""

    alignments: Sequence[Alignment | None]
    routes: Mapping[str, str]

    def by(self, *routes: str) -> set[str]:
        """The names of the parameters that go by one of these routes."""
        return {name for name, route in self.routes.items() if route in routes}

    def replay(self, run: BatchRun) -> Gradients:
        """The gradients [n, *shape] of the parameters that are neither captured nor unused, by running them again."""
        replayed: Gradients = {}
        if names := self.by(FUNCTION):
            replayed |= by_function(run.function, run.some(names), run.batch, run.samples)
        if names := self.by(LOOP):
            replayed |= by_loop(run.function, run.some(names), run.batch, run.samples)[0]
        if names := self.by(WITHIN):
            replayed |= within_batch(run.values, run.some(names), range(run.samples))
        return replayed


def aligned(run: BatchRun, alignments: Sequence[Alignment | None]) -> list[AlignedUse]:
    """The captured operations that the losses depend on and whose samples were found, samples first."""
    return [
        AlignedUse(use, alignment, run.samples, dy)
        for use, alignment, dy in zip(run.capture.uses, alignments, run.dys, strict=True)
        if alignment is not None and dy is not None
    ]
