"""Per-sample gradients of a model, batch by batch, in the layers and layouts that a store keeps.

For each batch: one forward pass that captures operations, one backward pass to their outputs (weights'
own gradients are never formed), and each layer's factors from the two. Parameters that this does not
give whole are run again sample by sample. What a batch's shape leaves open is settled, and compared with
plain autograd, the first time that shape is seen.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaql.storage.blocks import Block
from metaql.storage.recording import losses, sample_blocks
from metaql.storage.recording.aligned import AlignedUse
from metaql.storage.recording.batch_run import BatchRun, Signature, backward, run_batch
from metaql.storage.recording.batches import has_sparse
from metaql.storage.recording.examination import examine
from metaql.storage.recording.layer_outputs import LayerOutputs
from metaql.storage.recording.layering import form_layers
from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.ownership import is_owned
from metaql.storage.recording.plan import CAPTURED, LOOP, UNUSED, WITHIN, Plan, aligned
from metaql.storage.recording.replayed import Gradients
from metaql.storage.recording.sample_blocks import make_blocks
from metaql.storage.recording.self_check import shares
from metaql.storage.recording.wrappers import as_written
from metaql.storage.schema import Layer


@dataclass(frozen=True)
class BatchGradients:
    """What one batch gave: losses [n], logits [n, classes] where known, and each layer's block by its name.

    ``embeddings`` are the outputs of the modules that were watched, [n, ...], float32 on the CPU. ``replayed`` names
    the parameters that captured operations did not give.
    """

    losses: Tensor
    logits: Tensor | None
    blocks: Mapping[str, Block]
    embeddings: Mapping[str, Tensor]
    replayed: frozenset[str]


class SampleGradients:
    """Turns batches into blocks of per-sample gradients of the given parameters.

    ``layers`` are those of an existing store, which then must fit; None forms them from the first batch, and
    ``settle`` may put others in their place.
    """

    def __init__(
        self,
        function: ModelLosses,
        parameters: Mapping[str, torch.nn.Parameter],
        dtype: str,
        layers: tuple[Layer, ...] | None = None,
        settle: Callable[[tuple[Layer, ...]], tuple[Layer, ...]] = lambda formed: formed,
    ) -> None:
        self.layers = layers
        self._settle = settle
        self._losses = function
        self._parameters = parameters
        self._dtype = dtype
        self._plans: dict[Signature, Plan] = {}
        self._warned: set[str] = set()
        self._batches: Counter[Signature] = Counter()

    def of(self, batch: Any, ids: np.ndarray, watched: LayerOutputs | None = None) -> BatchGradients:
        """The gradients of the batch of these samples, which is on the model's device already."""
        samples = len(ids)
        with torch.enable_grad(), as_written():
            run = run_batch(self._losses, self._parameters, batch, samples, watched)
            losses.require_finite(run.values.detach(), ids)
            embeddings = {} if watched is None else self._embeddings(run, watched)
            plan, replayed = self._known(run) or self._examine(run)
        uses = [use for use in aligned(run, plan.alignments) if not _replaces(replayed, use)]
        assert self.layers is not None
        blocks = make_blocks(self.layers, uses, replayed, samples)
        sample_blocks.require_finite(blocks, ids, self._dtype)
        return BatchGradients(run.values.detach(), run.logits, blocks, embeddings, frozenset(replayed))

    def _embeddings(self, run: BatchRun, watched: LayerOutputs) -> dict[str, Tensor]:
        return watched.of_samples(
            self._losses,
            run.batch,
            run.samples,
            lambda sample, edges: backward(run.values[sample], edges),
            run.precision,
            run.capture.rows,
        )

    def _known(self, run: BatchRun) -> tuple[Plan, Gradients] | None:
        """The plan for batches like this one, if there is one that holds for this one, and what it replays."""
        plan = self._plans.get(run.signature)
        self._batches[run.signature] += 1
        # Losses may compare samples only where the data have something to compare. That is looked for now and then, in
        # the 2nd, 4th, 8th, … batch of a kind, which costs next to nothing.
        is_due = self._batches[run.signature].bit_count() == 1
        if plan is None or ((run.capture.rows.by_data or is_due) and not is_owned(run, plan)):
            return None
        try:
            return plan, plan.replay(run)
        except RuntimeError:
            # What torch.func does may depend on the data, and so may what it can't do.
            return None

    def _examine(self, run: BatchRun) -> tuple[Plan, Gradients]:
        """Settles the plan for batches like this one, and forms the layers; and what the plan replays."""
        found = examine(run, self.layers or ())
        plan = found.plan
        self._warn_of_slow(run.batch, plan, found.reference)
        if self.layers is None:
            uses = aligned(run, plan.alignments)
            formed = form_layers(self._parameters, uses, plan.by(CAPTURED), plan.by(UNUSED), self._dtype)
            self.layers = self._settle(formed)
        self._plans[run.signature] = plan
        return plan, found.replayed

    def _warn_of_slow(self, batch: Any, plan: Plan, reference: Gradients) -> None:
        slow = plan.by(LOOP, WITHIN) - self._warned
        if slow:
            self._warned |= slow
            share = shares(reference)
            listed = ", ".join(f"{name} ({share[name]:.0%} of the squared gradient)" for name in sorted(slow))
            warnings.warn(
                f"Recorded by running samples one by one, which is exact but slow: {listed}. To go faster, leave them "
                f"out with layers={', or pass dense inputs' if has_sparse(batch) else ''}.",
                stacklevel=2,
            )


def _replaces(replayed: Mapping[str, Tensor], use: AlignedUse) -> bool:
    return {use.captured.weight, use.captured.bias} - {None} <= set(replayed)
