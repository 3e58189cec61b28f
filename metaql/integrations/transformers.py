"""A callback that records from the ``Trainer`` of transformers.

>>> trainer = Trainer(model, args, train_dataset=train, eval_dataset=valid,
...                   callbacks=[RecorderCallback("runs/agnews")])            # doctest: +SKIP
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from metaql.errors import RecordingError
from metaql.integrations.model_losses import losses_like
from metaql.integrations.recording import Recording, require_known_processes, warn_of_half_precision
from metaql.integrations.samples import Samples, loader_of_samples
from metaql.integrations.undisturbed import undisturbed
from metaql.storage.recording.batches import move
from metaql.storage.recording.losses import LossFunction
from metaql.storage.recording.optimizers import checkpoint_settings


class RecorderCallback(TrainerCallback):
    """Records the gradients of a ``Trainer``'s data sets into the store at ``path``.

    ``when`` is the ``"end"`` of training, the end of each ``"epoch"``, or whenever the trainer has saved
    (``"save"``). Each time there is a checkpoint, with step, epoch and the settings of the last update, and the
    gradient of every sample of the training set (split ``train``) and of the evaluation set (``validation``; a dict of
    them gives a split for each key) with the model in eval mode. Sample ids are indices of the dataset. Batches come
    from the trainer's collator, in the size that it trains with; one that draws random numbers (masks) draws the
    same at each checkpoint. The training goes on as if nothing had been recorded.

    ``losses(model, batch)`` returns the samples' own losses [n]. By default a sample's loss is what the trainer's is
    for this sample alone, label smoothing included: the mean over its own labelled tokens, where it has labels of
    tokens (0 without any). This is compared before the training begins; a loss that can't be had so is an error.
    The other arguments are those of ``metaql.Recorder``; ``overwrite`` is for the first training of this callback.
    """

    def __init__(
        self,
        path: str | Path,
        losses: LossFunction | None = None,
        layers: Sequence[str] | str | None = None,
        dtype: str = "float32",
        inputs: bool = False,
        overwrite: bool = False,
        when: str = "end",
    ) -> None:
        self._recording = Recording(path, losses, layers, dtype, inputs, overwrite, when)
        self._losses = losses
        self._settings: dict[str, Any] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Finds out what would keep the training from being recorded."""
        trainer = _calling_trainer(self)
        _require_whole_model(trainer)
        require_known_processes(trainer.model_wrapped, args.world_size)
        if self._recording.when == "save" and args.save_strategy == "no":
            raise RecordingError("when='save' records when the trainer saves, and its save_strategy is 'no'.")
        if args.fp16:
            warn_of_half_precision()
        splits = _splits(trainer)
        model = _model(trainer)
        if self._recording.losses is None:
            with undisturbed(model), _without_cache(model):
                self._losses = _losses(trainer, splits["train"])
        self._recording.begin(trainer.model_wrapped, self._losses)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Notes the settings of this update: afterwards a schedule changes them, in the end to a rate of 0."""
        self._settings = checkpoint_settings(_["optimizer"])

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Records, if asked for at each epoch."""
        if self._recording.when == "epoch":
            self._record(_calling_trainer(self), state)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Records, if asked for at each save."""
        if self._recording.when == "save":
            self._record(_calling_trainer(self), state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Records, if asked for at the end."""
        if self._recording.when == "end":
            self._record(_calling_trainer(self), state)

    def _record(self, trainer: Trainer, state: TrainerState) -> None:
        model = _model(trainer)
        settings = {**self._settings, "step": state.global_step, "epoch": state.epoch}
        if self._recording.when == "end" and trainer.args.load_best_model_at_end and state.best_model_checkpoint:
            # These are the weights of an earlier step, whose other settings nobody noted.
            settings = {"step": state.best_global_step}
        with undisturbed(model), _without_cache(model):
            self._recording.record(trainer.model_wrapped, self._losses, _splits(trainer), settings)


def _calling_trainer(callback: TrainerCallback) -> Trainer:
    """The trainer that calls: it tells a callback neither its evaluation sets nor its loss, nor who it is."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
    raise RecordingError("This RecorderCallback is for the Trainer of transformers: pass it in callbacks=[...].")


def _model(trainer: Trainer) -> nn.Module:
    model = trainer.model
    assert isinstance(model, nn.Module)
    return model


def _require_whole_model(trainer: Trainer) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecordingError(
            "FSDP and DeepSpeed keep a part of each parameter in each process, and recording needs whole ones. Train "
            "without them, or record in one process afterwards with metaql.Recorder."
        )


def _splits(trainer: Trainer) -> dict[str, Samples]:
    """split => samples: the training set, and each evaluation set."""
    loaders = {"train": (trainer.callback_handler.train_dataloader, "The training set")}
    names = list(trainer.eval_dataset) if isinstance(trainer.eval_dataset, dict) else []
    for name in names:
        if name == "train":
            raise RecordingError("An evaluation set can't be called 'train': that is the training set's split.")
        loaders[name] = (trainer.get_eval_dataloader(name), f"The evaluation set '{name}'")
    if trainer.eval_dataset is not None and not names:
        loaders["validation"] = (trainer.get_eval_dataloader(), "The evaluation set")
    args = trainer.args
    return {
        split: Samples(
            loader_of_samples(loader, name), args.train_batch_size, rank=args.process_index, size=args.world_size
        )
        for split, (loader, name) in loaders.items()
    }


def _losses(trainer: Trainer, samples: Samples) -> LossFunction | None:
    """Found by the first batch of the training set; None for the recorder's default."""
    model = _model(trainer)
    # The same batch in each process.
    ids, batch = next(iter(replace(samples, rank=0, size=1)))
    encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))

    def own_loss(one: dict[str, Any]) -> Tensor:
        loss, _ = trainer.compute_loss(model, one, return_outputs=True)
        assert isinstance(loss, Tensor)
        return loss

    return losses_like(
        own_loss,
        model,
        move(batch, next(model.parameters()).device),
        len(ids),
        shifted=not encoder_decoder and getattr(model, "loss_type", None) in (None, "ForCausalLM"),
        labelled=encoder_decoder,
        smoothing=trainer.args.label_smoothing_factor,
    )


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """Without the keys and values of attention, which are for generating and take memory here."""
    configs: dict[int, Any] = {id(each.config): each.config for each in model.modules() if hasattr(each, "config")}
    caching = [each for each in configs.values() if getattr(each, "use_cache", False)]
    for each in caching:
        each.use_cache = False
    try:
        yield
    finally:
        for each in caching:
            each.use_cache = True
