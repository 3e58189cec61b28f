"""Recording along the trajectory: each sample at each step it is trained on, from the loop's own backward pass."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from metaql.errors import BatchError
from metaql.storage import tables
from metaql.storage.blocks import Block, size
from metaql.storage.collection_writer import CollectionWriter
from metaql.storage.group import Group
from metaql.storage.recording.alignment import Alignment
from metaql.storage.recording.batches import integer_ids
from metaql.storage.recording.layering import form_layers
from metaql.storage.recording.model_state import unchanging
from metaql.storage.recording.optimizers import step_settings
from metaql.storage.recording.sample_blocks import make_blocks, require_finite, require_same_form
from metaql.storage.recording.step_checks import aligned_uses, require_captured, require_finite_pass, require_sums
from metaql.storage.recording.watched_step import WatchedStep, noting_scale
from metaql.storage.recording.wrappers import as_written, unaveraged
from metaql.storage.schema import Layer
from metaql.storage.store import Store
from metaql.storage.writer import Writer

Reduction = Literal["mean", "sum"] | Tensor

# A crash loses at most what came after the last commit: so much, or so long. The training waits for each one.
COMMIT_BYTES = 4 << 30
COMMIT_SECONDS = 30.0


class Trajectory:
    """The steps of a training run on their way into a store."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        writer: Writer,
        dtype: str,
        model: str,
        losses: str,
        group: Group,
        settle: Callable[[tuple[Layer, ...]], tuple[Layer, ...]],
        wrapped: nn.Module,
    ) -> None:
        self._parameters = parameters
        self._writer = writer
        self._dtype = dtype
        self._model = model
        self._losses = losses
        self._group = group
        self._settle = settle
        self._wrapped = wrapped
        self._layers = writer.manifest.layers
        self._alignments: dict[tuple[Any, ...], Sequence[Alignment | None]] = {}
        self._collection: CollectionWriter | None = None
        self._split: str | None = None
        self._rows: list[dict[str, Any]] = []
        self._since = 0.0
        self._steps: int | None = None
        self._warned = False

    @property
    def steps(self) -> int:
        """The number of the last step recorded, also in an earlier run of the same store."""
        if self._steps is None:
            self._steps = self._last_step()
        return self._steps

    @contextmanager
    def step(
        self, ids: Any, optimizer: torch.optim.Optimizer, split: str, reduction: Reduction, mixing: bool
    ) -> Iterator[None]:
        """Records what one forward and backward pass inside the context shows.

        ``mixing`` says that the model is in a mode that mixes samples (batch norm in training).
        """
        ids = integer_ids(ids)
        factors = _factors(reduction, len(ids))
        # The settings that this step's update uses: schedulers and the update itself come after the pass.
        groups = step_settings(optimizer)
        watched = WatchedStep(
            self._parameters,
            len(ids),
            unchanging(self._wrapped),
            unsettled=lambda signature: signature not in self._alignments,
            mixing=mixing,
            around_probes=lambda: unaveraged(self._wrapped),
        )
        try:
            with as_written(), noting_scale(watched.note_scale), watched:
                yield
        finally:
            watched.stop()
        with self._group.together("step") as turn:
            blocks, scale = self._blocks(watched), 1.0 / (factors * watched.scale)
            require_finite(blocks, ids, self._dtype, scale)
            turn.own = len(ids), int(self._is_due(blocks))
        self._append(ids, split, blocks, scale)
        self._warn_if_reordered(watched)
        sizes = [size for size, _ in turn.all]
        common = {"step": self.steps, "batch_size": sum(sizes), "reduction": _name(reduction, sizes)}
        self._rows += [{**group, **common} for group in groups]
        # Rank 0's clock counts.
        if turn.all[0][1]:
            self.commit()

    def _warn_if_reordered(self, watched: WatchedStep) -> None:
        if watched.reordered and not self._warned:
            self._warned = True
            warnings.warn(
                "Inside recorder.step(...) rows of the batch were put in another order. The samples are told apart by "
                "the rows of the model's output, and ids are taken to be in that order: if it is not that of the ids, "
                "shuffle or sort the batch and its ids before the step.",
                stacklevel=4,
            )

    def commit(self) -> None:
        """Makes the steps so far part of the store."""
        if self._collection is None:
            return
        with self._group.together("step"):
            collection, self._collection = self._collection, None
            rows, self._rows = self._rows, []
            collection.finish(steps=pa.Table.from_pylist(rows, tables.STEPS) if self._group.leads else None)

    def abandon(self) -> None:
        """Drops the steps that are not committed, with a warning: for a rank whose others may be elsewhere."""
        if self._collection is not None:
            collection, self._collection, self._rows = self._collection, None, []
            collection.abort()
            warnings.warn(
                f"The last recorded steps, up to step {self._steps}, are not in the store: an error on one rank alone "
                "leaves only what all of them had committed.",
                stacklevel=3,
            )

    def _last_step(self) -> int:
        if not any(each.steps for each in self._writer.manifest.collections):
            return 0
        with closing(Store.open(self._writer.path)) as store:
            return int(np.max(tables.steps(store).column("step").to_numpy()))

    def _append(self, ids: np.ndarray, split: str, blocks: Mapping[str, Block], scale: Tensor) -> None:
        if split != self._split:
            self.commit()
        if self._collection is None:
            self._writer.define(self._model, self._layers, self._dtype, self._losses)
            self._collection = self._writer.collection(split, None)
            self._split, self._since = split, time.monotonic()
        number = self.steps + 1
        self._collection.append(ids, blocks, None, step=number, scale=scale)
        self._steps = number

    def _is_due(self, blocks: Mapping[str, Block]) -> bool:
        """Whether to commit once these are appended."""
        waiting = sum(map(size, blocks.values()))
        if self._collection is None:
            return waiting > COMMIT_BYTES
        return self._collection.bytes + waiting > COMMIT_BYTES or time.monotonic() - self._since > COMMIT_SECONDS

    def _blocks(self, watched: WatchedStep) -> dict[str, Block]:
        """Each layer's block, of the loss that was differentiated, from a pass that is over."""
        require_captured(watched)
        is_new = watched.rows.by_data or watched.signature not in self._alignments
        if is_new:
            require_finite_pass(watched)
        alignments = watched.alignments if is_new else self._alignments[watched.signature]
        uses = aligned_uses(watched, alignments)
        if is_new:
            require_sums(uses, watched)
        if not self._layers:
            fired = set(watched.gradients)
            formed = form_layers(self._parameters, uses, fired, set(self._parameters) - fired, self._dtype)
            self._layers = self._settle(formed)
        if is_new:
            for layer in self._layers:
                require_same_form(layer, uses, set(self._parameters))
            assert alignments is not None
            self._alignments[watched.signature] = alignments
        return make_blocks(self._layers, uses, {}, watched.samples)


def _name(reduction: Reduction, sizes: Sequence[int]) -> str:
    """How the update's gradient was made of the samples' own, over all ranks, of which it is the mean."""
    if not isinstance(reduction, str):
        return "weights"
    # Only where all ranks have as many is the mean of their means that of all samples; of sums it never is the sum.
    same = len(set(sizes)) == 1 if reduction == "mean" else len(sizes) == 1
    return reduction if same else "weights"


def _factors(reduction: Reduction, samples: int) -> Tensor:
    """Each sample's factor in the loss, float64 [n]."""
    if isinstance(reduction, str):
        if reduction not in ("mean", "sum"):
            raise BatchError(f"reduction is 'mean', 'sum' or a tensor of each sample's factor, not {reduction!r}.")
        return torch.full((samples,), 1.0 / samples if reduction == "mean" else 1.0, dtype=torch.float64)
    factors = torch.as_tensor(reduction).detach().cpu().double()
    if factors.shape != (samples,) or not bool(torch.isfinite(factors).all()) or bool((factors == 0).any()):
        raise BatchError(
            f"reduction needs one finite factor other than zero for each of the {samples} samples; it is "
            f"{list(factors.shape)} {factors.flatten()[:5].tolist()}. A sample of factor zero leaves no gradient."
        )
    return factors
