"""The recorder: what stands beside a training loop and fills a store."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from metaql.errors import ModelStateError, RecordingError, UnsupportedParameterError
from metaql.storage.collection_writer import CollectionWriter
from metaql.storage.curvatures import pack
from metaql.storage.group import Group
from metaql.storage.manifest import CROSS_ENTROPY
from metaql.storage.recording.collecting import Collecting, of_first_rank
from metaql.storage.recording.continued import require_same_model, require_split
from metaql.storage.recording.curvature import CurvatureGatherer, require_known
from metaql.storage.recording.estimate import Estimate, estimate, first_batch
from metaql.storage.recording.layer_outputs import LayerOutputs
from metaql.storage.recording.losses import LossFunction, ModelLosses
from metaql.storage.recording.metadata import as_table, shared
from metaql.storage.recording.model_state import (
    digest,
    mixes_samples,
    require_repeatable,
    require_values,
    trainable,
    weights,
)
from metaql.storage.recording.optimizers import checkpoint_settings
from metaql.storage.recording.sample_gradients import SampleGradients
from metaql.storage.recording.trajectory import Chosen, Reduction, Trajectory
from metaql.storage.recording.wrappers import distributed, ranks_of, require_whole, runs_copies, unwrapped
from metaql.storage.writer import Writer

DTYPES = ("float32", "float64", "bfloat16")


class Recorder:
    """Records the per-sample gradients of a model into the store at ``path``.

    ``losses(model, batch)`` returns the samples' own losses, a tensor [n]; by default cross entropy of
    ``model(inputs)``, [n, classes, ...], against targets, for batches of (inputs, targets) or dicts with ``labels``.
    ``layers`` are shell patterns of parameter names to record, a module's name standing for all of its parameters;
    None records every trainable parameter. ``dtype`` is that on disk: ``float32``, ``float64`` or ``bfloat16``.
    ``inputs`` keeps the samples' inputs too. A store that exists is continued if it is of the same model;
    ``overwrite`` begins it anew.

    A stored gradient is that of the sample's own loss, whatever mean the training loop takes. Use it as a context
    manager, or call ``close``.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str | Path,
        losses: LossFunction | None = None,
        layers: Sequence[str] | str | None = None,
        dtype: str = "float32",
        inputs: bool = False,
        overwrite: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise RecordingError(f"dtype can be {', '.join(map(repr, DTYPES))}; not {dtype!r}.")
        self._wrapped = model
        self._model = unwrapped(model)
        self._losses = (
            CROSS_ENTROPY if losses is None else f"losses={getattr(losses, '__name__', type(losses).__name__)}"
        )
        self._dtype = dtype
        self._keep_inputs = inputs
        self._patterns = layers
        self._closed = False
        self._group = Group(ranks_of(model))
        with ExitStack() as undo:
            undo.callback(self._group.leave)
            with self._group.together("Recorder"):
                self._parameters = trainable(self._model, layers)
                self._function = ModelLosses(self._model, losses)
                require_whole(self._model)
                require_values(self._model)
                self._writer = Writer.open(path, overwrite=overwrite, group=self._group)
                undo.callback(self._writer.close)
                self._require_same_model()
            undo.pop_all()
        self._prepare()

    def checkpoint(self, optimizer: torch.optim.Optimizer | None = None, **settings: Any) -> int:
        """Saves the weights under the next number, which is returned, with the optimizer's settings.

        ``settings`` are kept beside them, such as ``epoch=3``: numbers, strings, booleans or None. Steps
        recorded so far are committed.
        """
        self._require_open()
        with self._group.together("checkpoint"):
            self._trajectory.commit()
            self._share_buffers()
            return self._save(optimizer, settings)

    def _save(self, optimizer: torch.optim.Optimizer | None, settings: Mapping[str, Any]) -> int:
        # Rank 0's are saved.
        state = weights(self._model) if self._group.leads else {}
        known = {**(checkpoint_settings(optimizer) if optimizer is not None else {}), **settings}
        step = known.pop("step", self._trajectory.steps or None)
        if step is not None and (not isinstance(step, int) or isinstance(step, bool)):
            raise RecordingError(f"step is the number of the training step, an integer, not {step!r}.")
        if self._trajectory.steps:
            if "updates" in settings:
                raise RecordingError(
                    "The number of the optimizer's updates is kept as the setting 'updates'; give yours another name."
                )
            known["updates"] = self._trajectory.updates
        for name, value in known.items():
            if isinstance(value, int) and not -(2**63) <= value < 2**63:
                raise RecordingError(f"The setting {name}={value} does not fit into 64 bits. Pass it as a string.")
        return self._writer.add_checkpoint(state, digest(state), step, known)

    def collect(
        self,
        data: Any,
        split: str,
        metadata: Any = None,
        batch_size: int = 256,
        logits: bool = False,
        embeddings: Sequence[str] | None = None,
    ) -> int:
        """Records the gradient of every sample of ``data`` at the newest checkpoint; returns how many.

        ``data`` is a map-style Dataset of (input, target), read in batches of ``batch_size``, whose indices become
        the sample ids; or an iterable of (ids, batch). ``metadata`` is a table with a ``sample_id`` column (pandas,
        polars, Arrow, a dict of columns); ``label`` comes from integer targets by itself. ``logits`` keeps these of the
        default loss, a column of ``outputs``; ``embeddings`` what the modules of these names put out for each sample,
        the relation of that name. All or nothing: an error leaves the store as it was.

        With DistributedDataParallel every rank calls it. The samples of a map-style Dataset are shared out over the
        ranks; an iterable gives the rank's own. ``metadata`` may be given on rank 0 alone, and all samples are counted.

        Raises ModelStateError without a checkpoint, if the weights moved since, or while batch norm or dropout is
        in training mode; SampleIdError, BatchError, NotFiniteError, UnsupportedParameterError about the data.
        """
        self._require_open()
        with self._group.together("collect"):
            self._follow_parameters()
            # Steps may have settled the layers since this recorder was made.
            self._gradients.layers = self._gradients.layers or self._writer.manifest.layers or None
            checkpoint = self._checkpoint_of_these_weights()
            require_repeatable(self._model)
            require_split(split, self._writer.manifest)
            self._require_logits(logits)
            watched = None if embeddings is None else LayerOutputs(self._model, embeddings)
            table = shared(None if metadata is None else as_table(metadata), self._group)
            collecting = Collecting(
                self._gradients,
                self._writer,
                self._group,
                split,
                checkpoint,
                begin=lambda: self._begin(split, checkpoint),
                require_still=lambda: self._require_still(checkpoint),
                device=self._device,
                inputs=self._keep_inputs,
                logits=logits,
                watched=watched,
            )
            return collecting.record(data, batch_size, table)

    def estimate(self, data: Any, batch_size: int = 256) -> Estimate:
        """What recording all of ``data`` would take, in bytes, memory and seconds, from its first batch; ``print`` it.

        ``data`` is as for ``collect``. Nothing is written, and no checkpoint is needed; ``collect`` does not check that
        batch again. Metadata, logits and embeddings are not counted. BatchError for a generator, whose first batch
        would be used up; otherwise the errors of ``collect``. With DistributedDataParallel every rank calls it.
        """
        self._require_open()
        with self._group.together("estimate"):
            self._follow_parameters()
            require_repeatable(self._model)
            first = first_batch(data, batch_size, self._group)
            names = trainable(self._model, None)
            return estimate(first, self._gradients, self._device, self._keep_inputs, self._writer.path, names)

    def curvature(self, data: Any, method: str = "ekfac", labels: str = "sampled", batch_size: int = 256) -> int:
        """Gathers the curvature of the loss at the newest checkpoint, for ``precondition`` in SQL; returns of how many.

        ``data`` is as for ``collect``, as a rule all that the model was trained on. ``method`` is ``"ekfac"``, which
        reads it twice and serves for K-FAC too, ``"kfac"`` or ``"diagonal"``. ``labels="sampled"`` draws targets from
        the model's predictions, which is the true Fisher matrix and needs the default loss; ``"recorded"`` takes the
        data's own, which is the empirical one. Linear layers and convolutions have Kronecker factors, all others the
        diagonal. In place of what the method has gathered at this checkpoint before. All or nothing.

        Takes a forward and a backward pass each time that data are read (with drawn targets one more forward pass),
        and for a layer with inputs i and outputs o about 16·(i² + o² + i·o) bytes.

        Raises ModelStateError without a checkpoint or a collection, or if the weights moved since; RecordingError for
        unknown names; and about the data what ``collect`` raises. With DistributedDataParallel every rank calls it.
        """
        self._require_open()
        require_known(method, labels, self._losses)
        with self._group.together("curvature"):
            self._follow_parameters()
            # Steps may have settled the layers since this recorder was made.
            self._gradients.layers = self._gradients.layers or self._writer.manifest.layers or None
            checkpoint = self._checkpoint_of_these_weights()
            require_repeatable(self._model)
            layers = self._writer.manifest.layers
            if not layers:
                raise ModelStateError("No layers are recorded yet: call recorder.collect first, then curvature.")
            gatherer = CurvatureGatherer(self._function, self._parameters, layers, self._dtype, self._group)
            fitted = gatherer.fit(data, method, labels, batch_size)
            self._require_still(checkpoint)
            eigenvalues = {name: float(each.eigenvalues.mean()) for name, each in fitted.layers.items()}
            tensors = pack(fitted.layers, method)
            self._writer.add_curvature(tensors, checkpoint, method, labels, fitted.samples, eigenvalues)
            return fitted.samples

    def step(
        self,
        ids: Any,
        optimizer: torch.optim.Optimizer,
        split: str = "train",
        reduction: Reduction = "mean",
        every: int = 1,
        keep: Container[int] | None = None,
    ) -> AbstractContextManager[None]:
        """A context around one forward and backward pass of the training loop, which records its samples.

        ``ids`` are those of the batch, in the order of the model's outputs. ``reduction`` says how its loss was made
        of the samples' own: ``"mean"``, ``"sum"``, or a tensor [n] of each sample's factor in it: class weights,
        positions that are ignored, or a loss divided for gradient accumulation need the tensor, for nothing here can
        see them. The gradients are recorded as the backward pass sees them, batch norm, dropout and losses that
        compare samples included. They are committed now and then, by ``checkpoint`` and by ``close``.

        ``every=10`` records the passes of one update of the optimizer in ten, and ``keep``, a set or a range of ids,
        those samples alone. What is left out counts as nothing in ``hydra``.

        With DistributedDataParallel every rank calls it, with the samples of its own batch and the ``reduction`` of
        its own loss; the step is one for all of them.
        """
        self._require_open()
        if runs_copies(self._wrapped):
            raise UnsupportedParameterError(
                "DataParallel runs copies of the parameters on other devices, where a step can't be watched. Train "
                "with DistributedDataParallel, or record at checkpoints with collect."
            )
        self._follow_parameters()
        require_split(split, self._writer.manifest)
        chosen = Chosen(every, keep)
        return self._trajectory.step(ids, optimizer, split, reduction, chosen, mixes_samples(self._model))

    def close(self) -> None:
        """Commits the steps recorded so far and lets others write; harmless when called twice.

        With DistributedDataParallel every rank calls it. After an error on this rank alone, leave by way of ``with``
        instead, which does not wait for the others.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._trajectory.close()
        finally:
            self._writer.close()
            self._group.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            if error is not None and not self._group.knows(error):
                self._group.leave()
                self._trajectory.abandon()
        finally:
            self.close()

    @property
    def _device(self) -> torch.device:
        return next(iter(self._parameters.values())).device

    def _prepare(self) -> None:
        known = self._writer.manifest.layers or None
        settle = partial(of_first_rank, self._group)
        self._gradients = SampleGradients(self._function, self._parameters, self._dtype, known, settle)
        name = type(self._model).__name__
        self._trajectory = Trajectory(
            self._parameters,
            self._writer,
            self._dtype,
            name,
            self._losses,
            self._group,
            settle,
            self._wrapped,
        )

    def _require_same_model(self) -> None:
        require_same_model(self._writer.manifest, self._writer.path, self._parameters, self._losses, self._dtype)

    def _share_buffers(self) -> None:
        """Gives every rank the buffers of rank 0, as the next forward pass would."""
        ddp = distributed(self._wrapped)
        if ddp is None or not ddp.broadcast_buffers:
            return
        own = {name: each for name, each in self._model.named_buffers() if name not in ddp.parameters_to_ignore}
        leaders = self._group.lead(lambda: {name: each.detach().cpu() for name, each in own.items()})
        with torch.no_grad():
            for name, buffer in own.items():
                if not self._group.leads:
                    buffer.copy_(leaders[name])

    def _require_open(self) -> None:
        if self._closed:
            raise RecordingError(
                f"This recorder of {self._writer.path} is closed. Make another one to go on; it continues the store."
            )

    def _follow_parameters(self) -> None:
        """Takes over parameters that were replaced, frozen, thawed or added since the recorder was made."""
        now = trainable(self._model, self._patterns)
        if {name: id(each) for name, each in now.items()} == {
            name: id(each) for name, each in self._parameters.items()
        }:
            return
        self._trajectory.close()
        self._parameters = now
        self._require_same_model()
        self._prepare()

    def _require_logits(self, wanted: bool) -> None:
        if wanted and self._losses != CROSS_ENTROPY:
            raise RecordingError(
                "logits=True keeps those of the default loss; your losses= do not show any. Keep the output of the "
                "module that makes them: embeddings=['classifier'], or embeddings=[''] for the whole model's."
            )

    def _require_still(self, checkpoint: int) -> None:
        """Raises if recording itself has changed the model, so that the gradients are not all of one model."""
        if not self._is_at_newest_checkpoint():
            raise ModelStateError(
                f"The model is no longer that of checkpoint {checkpoint}: running it changed its weights or buffers "
                "(running statistics in training mode, an embedding's max_norm, an optimizer called by hooks). Switch "
                "that off, for instance with model.eval(), and collect again."
            )

    def _begin(self, split: str, checkpoint: int) -> CollectionWriter:
        assert self._gradients.layers is not None
        self._writer.define(type(self._model).__name__, self._gradients.layers, self._dtype, self._losses)
        return self._writer.collection(split, checkpoint)

    def _checkpoint_of_these_weights(self) -> int:
        checkpoints = self._writer.manifest.checkpoints
        if not checkpoints:
            raise ModelStateError(
                "There is no checkpoint to collect at yet. Call recorder.checkpoint(optimizer) first."
            )
        newest = checkpoints[-1]
        if not self._is_at_newest_checkpoint():
            otherwise = "" if self._group.leads else ", or this rank's buffers differ (broadcast_buffers=False)"
            raise ModelStateError(
                f"The weights have moved since checkpoint {newest.number}{otherwise}. Call "
                "recorder.checkpoint(optimizer) before collect, so that the gradients belong to weights that are kept."
            )
        return newest.number

    def _is_at_newest_checkpoint(self) -> bool:
        return self._writer.manifest.checkpoints[-1].digest == digest(self._model.state_dict())
