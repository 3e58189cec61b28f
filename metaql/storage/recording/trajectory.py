"""Recording along the trajectory: each sample at each step it is trained on, from the loop's own backward pass."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from metaql.errors import BatchError, RecordingError
from metaql.storage import tables
from metaql.storage.blocks import Block, size, take
from metaql.storage.collection_writer import CollectionWriter
from metaql.storage.group import Group
from metaql.storage.recording.alignment import Alignment
from metaql.storage.recording.batches import integer_ids
from metaql.storage.recording.layering import form_layers
from metaql.storage.recording.model_state import unchanging
from metaql.storage.recording.sample_blocks import make_blocks, require_finite, require_same_form
from metaql.storage.recording.step_checks import aligned_uses, require_captured, require_finite_pass, require_sums
from metaql.storage.recording.updates import Updates
from metaql.storage.recording.watched_step import WatchedStep, noting_scale
from metaql.storage.recording.wrappers import as_written, unaveraged
from metaql.storage.schema import Layer
from metaql.storage.store import Store
from metaql.storage.writer import Writer

Reduction = Literal["mean", "sum"] | Tensor

# A crash loses at most what came after the last commit: so much, or so long. The training waits for each one.
COMMIT_BYTES = 4 << 30
COMMIT_SECONDS = 30.0


@dataclass(frozen=True)
class Chosen:
    """What of a trajectory is recorded: every so many updates, and those samples that ``keep`` contains."""

    every: int = 1
    keep: Container[int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise RecordingError(
                f"every is a whole number from 1 on, not {self.every!r}: 10 records each tenth update."
            )
        unfit = isinstance(self.keep, (str, list, tuple, Tensor, np.ndarray))
        if unfit or not hasattr(self.keep or (), "__contains__"):
            raise RecordingError(
                f"keep is a {type(self.keep).__name__}. Pass a set or a range of sample ids: each sample of each step "
                "is looked up in it."
            )

    def samples(self, ids: np.ndarray) -> np.ndarray | None:
        """Which of the samples are recorded, bool [n]; None for all."""
        if self.keep is None:
            return None
        return np.fromiter((each in self.keep for each in ids.tolist()), dtype=bool, count=len(ids))


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
        # By split; those of training and of validation may take turns.
        self._collections: dict[str, CollectionWriter] = {}
        self._split: str | None = None
        self._since = 0.0
        self._is_due = False
        self._steps: int | None = None
        self._updates: Updates | None = None
        self._warned = False

    @property
    def steps(self) -> int:
        """The number of the last step recorded, also in an earlier run of the same store."""
        if self._steps is None:
            self._steps, _ = self._continued()
        return self._steps

    @property
    def updates(self) -> int:
        """How many updates of the optimizer there were so far, from the first step recorded on."""
        return self._continued()[1] if self._updates is None else self._updates.made

    @contextmanager
    def step(
        self, ids: Any, optimizer: torch.optim.Optimizer, split: str, reduction: Reduction, chosen: Chosen, mixing: bool
    ) -> Iterator[None]:
        """Records what one forward and backward pass inside the context shows.

        ``mixing`` says that the model is in a mode that mixes samples (batch norm in training).
        """
        ids = integer_ids(ids)
        factors = _factors(reduction, len(ids))
        kept = chosen.samples(ids)
        updates = self._watching(optimizer)
        if self._is_due:
            self.commit()
        if updates.made % chosen.every:
            with updates.around_pass():
                yield
            return
        watched = WatchedStep(
            self._parameters,
            len(ids),
            unchanging(self._wrapped),
            unsettled=lambda signature: signature not in self._alignments,
            mixing=mixing,
            around_probes=lambda: unaveraged(self._wrapped),
        )
        try:
            with as_written(), noting_scale(watched.note_scale), updates.around_pass(), watched:
                yield
        finally:
            watched.stop()
        with self._group.together("step") as turn:
            blocks, scale = self._blocks(watched), 1.0 / (factors * watched.scale)
            if kept is not None:
                places = torch.from_numpy(kept.nonzero()[0])
                blocks = {name: take(block, places) for name, block in blocks.items()}
                ids, scale = ids[kept], scale[places]
            if len(ids):
                require_finite(blocks, ids, self._dtype, scale)
            turn.own = len(factors), _common(factors), int(self._is_due_after(blocks))
        self._append(ids, split, blocks, scale)
        self._warn_if_reordered(watched)
        updates.add_pass({"step": self.steps, **_together(turn.all, reduction)}, watched.scale)
        # Rank 0's clock counts. The update is still to come, and belongs to the step.
        self._is_due = bool(turn.all[0][2])

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
        self._is_due = False
        if self._updates is None or not (self._collections or self._has_updates_left):
            return
        with self._group.together("step"):
            if not self._collections and self._split is not None:
                self._begin(self._split)
            collections, self._collections = list(self._collections.values()), {}
            for number, collection in enumerate(collections):
                collection.finish(steps=self._take_rows() if number == 0 else None)

    def close(self) -> None:
        """Commits, and stops listening to the optimizer."""
        try:
            self.commit()
        finally:
            if self._updates is not None:
                self._updates.stop()

    def abandon(self) -> None:
        """Drops the steps that are not committed, with a warning: for a rank whose others may be elsewhere."""
        if self._collections:
            collections, self._collections = self._collections, {}
            for collection in collections.values():
                collection.abort()
            warnings.warn(
                f"The last recorded steps, up to step {self._steps}, are not in the store: an error on one rank alone "
                "leaves only what all of them had committed.",
                stacklevel=3,
            )
        if self._updates is not None:
            self._updates.stop()
            self._updates = None

    @property
    def _has_updates_left(self) -> bool:
        return self._updates is not None and any(row["update"] is not None for row in self._updates.rows)

    def _take_rows(self) -> Any:
        """The rows of ``steps``, on the rank that writes them."""
        assert self._updates is not None
        rows, groups = self._updates.take(), self._updates.groups
        if not self._group.leads:
            return None
        return pa.Table.from_pylist(rows, tables.STEPS).replace_schema_metadata(
            {tables.PARAMETER_GROUPS: json.dumps(groups)}
        )

    def _watching(self, optimizer: torch.optim.Optimizer) -> Updates:
        if self._updates is None:
            self._steps, made = self._continued()
            self._updates = Updates(self._parameters, made)
        self._updates.watch(optimizer)
        return self._updates

    def _continued(self) -> tuple[int, int]:
        """The last step and the number of updates in the store, 0 where there are none."""
        if not any(each.steps for each in self._writer.manifest.collections):
            return 0, 0
        with closing(Store.open(self._writer.path)) as store:
            steps = tables.steps(store)
        step, updates, update = (pc.max(steps.column(name)).as_py() or 0 for name in ("step", "updates", "update"))
        return step, max(updates, update)

    def _begin(self, split: str) -> CollectionWriter:
        if not self._collections:
            self._writer.define(self._model, self._layers, self._dtype, self._losses)
            self._since = time.monotonic()
        if split not in self._collections:
            self._collections[split] = self._writer.collection(split, None)
        self._split = split
        return self._collections[split]

    def _append(self, ids: np.ndarray, split: str, blocks: Mapping[str, Block], scale: Tensor) -> None:
        number = self.steps + 1
        self._begin(split).append(ids, blocks, None, step=number, scale=scale)
        self._steps = number

    def _is_due_after(self, blocks: Mapping[str, Block]) -> bool:
        """Whether to commit once these are appended."""
        waiting = sum(map(size, blocks.values())) + sum(each.bytes for each in self._collections.values())
        late = bool(self._collections) and time.monotonic() - self._since > COMMIT_SECONDS
        return waiting > COMMIT_BYTES or late

    def _blocks(self, watched: WatchedStep) -> dict[str, Block]:
        """Each layer's block, of the loss that was differentiated, from a pass that is over."""
        require_captured(watched)
        self._layers = self._layers or self._writer.manifest.layers
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


def _together(shares: Sequence[tuple[int, int, int]], reduction: Reduction) -> dict[str, Any]:
    """What ``steps`` says of a pass, over all ranks, of whose gradients the update's is the mean."""
    sizes = [size for size, _, _ in shares]
    factors = {factor for _, factor, _ in shares}
    common = float(np.int64(factors.pop()).view(np.float64)) if len(factors) == 1 else math.nan
    return {
        "batch_size": sum(sizes),
        "reduction": _name(reduction, sizes),
        "sample_factor": None if math.isnan(common) else common / len(shares),
    }


def _common(factors: Tensor) -> int:
    """The bits of the factor that all samples have, as an integer, which ranks can tell each other; NaN's if none."""
    alike = len(factors) and bool((factors == factors[0]).all())
    return int(np.float64(factors[0] if alike else math.nan).view(np.int64))


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
