"""Whether what comes back to a row of an operation is of one sample's loss, and of the right one's."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from metaql.errors import ModelStateError
from metaql.storage.recording.alignment import LEAK, candidates, owns
from metaql.storage.recording.batch_run import BatchRun, backward
from metaql.storage.recording.mixture import random_weights
from metaql.storage.recording.plan import Plan, aligned
from metaql.storage.recording.self_check import disagreeing


def is_owned(run: BatchRun, plan: Plan) -> bool:
    """Whether what comes to each row grows with the loss of the sample that the plan gives it to, and with no other."""
    uses = aligned(run, plan.alignments)
    if not uses:
        return True
    weights = random_weights(run.samples)
    mixed = backward((run.values * weights.to(run.values)).sum(), [use.captured.edge for use in uses])
    got, expected = {}, {}
    for number, (use, dy) in enumerate(zip(uses, mixed, strict=True)):
        if dy is None:
            return False
        got[str(number)] = replace(use, dy=dy).prefix
        expected[str(number)] = use.prefix * weights.to(use.prefix)[:, None, None]
    return not disagreeing(got, expected, run.precision)


def require_unmixed(run: BatchRun) -> None:
    """Raises if several samples' losses reach the same of what surely are samples' rows."""
    if run.hidden:
        return
    edges = run.edges
    # Rows need not lie as the samples do, such as the nodes of graphs; but they are one sample's each.
    reached: dict[int, Tensor] = {}
    strangers: set[int] = set()
    for sample in range(run.samples):
        for place, (use, dy) in enumerate(zip(run.capture.uses, backward(run.values[sample], edges), strict=True)):
            ways = candidates(use.leading, run.samples)
            if dy is None or not ways:
                continue
            rows = use.use.lead(dy).reshape(*use.leading, -1).abs().sum(-1)
            reached[place] = (rows > LEAK * rows.sum()) + reached.get(place, torch.zeros_like(rows, dtype=torch.int64))
            if not any(owns(way, use.use.lead(dy), use.leading, run.samples, sample) for way in ways):
                strangers.add(place)
    if any(int(reached[place].max()) > 1 for place in strangers):
        raise ModelStateError(
            "A sample can't be run alone, and within its batch its loss depends on other samples, so it has no "
            "gradient of its own. Statistics over the batch and losses that compare samples do this. If each sample "
            "does have its own, pass batches whose tensors have the samples in their first dimension, or batches of "
            "one sample."
        )
