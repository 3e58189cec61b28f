"""A callback that records from the ``Trainer`` of Lightning.

>>> trainer = L.Trainer(callbacks=[RecorderCallback("runs/cifar")])            # doctest: +SKIP
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn

from metaql.errors import RecordingError
from metaql.integrations.recording import Recording, require_known_processes, warn_of_half_precision
from metaql.integrations.samples import Samples, loader_of_samples
from metaql.integrations.undisturbed import undisturbed
from metaql.storage.recording.batches import map_tensors
from metaql.storage.recording.losses import LossFunction
from metaql.storage.recording.optimizers import checkpoint_settings


class RecorderCallback(Callback):
    """Records the gradients of a ``Trainer``'s data sets into the store at ``path``.

    ``when`` is the ``"end"`` of training, the end of each ``"epoch"``, or whenever the trainer saves (``"save"``).
    Each time there is a checkpoint, with step, epochs completed and the settings of the last update (none where there
    are several optimizers), and the gradient of every sample of the training set (split ``train``) and of the
    validation set (``validation``; several of them are ``validation_0`` and so on, a dict gives a split for each key)
    with the model in eval mode. Sample ids are indices of the dataset. Batches come from the loader's collator and
    through the hooks of the module or datamodule; what draws random numbers there draws the same at each checkpoint.
    The training goes on as if nothing had been recorded.

    ``losses(model, batch)`` returns the samples' own losses [n]; by default cross entropy of ``model(inputs)`` against
    targets. ``training_step`` is not asked: pass ``losses`` where its loss is another one. The model runs in the
    trainer's precision. The other arguments are those of ``metaql.Recorder``; ``overwrite`` is for the first training
    of this callback.
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
        self._settings: dict[str, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds out what would keep the training from being recorded."""
        _require_whole_model(trainer)
        require_known_processes(_wrapped(trainer), trainer.world_size)
        if self._recording.when == "save" and not trainer.checkpoint_callbacks:
            raise RecordingError("when='save' records when the trainer saves, and it has no ModelCheckpoint.")
        if self._recording.losses is None and type(pl_module).forward is LightningModule.forward:
            raise RecordingError(
                f"{type(pl_module).__name__} has no forward, of which the default loss is cross entropy. Write one, or "
                "pass losses=, a function of (model, batch) that returns one loss for each sample."
            )
        if str(trainer.precision).startswith("16"):
            warn_of_half_precision()
        _splits(trainer)
        self._recording.begin(_wrapped(trainer), self._losses(trainer))

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the settings of this update, which a schedule changes afterwards."""
        self._settings = checkpoint_settings(optimizer) if len(trainer.optimizers) == 1 else {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records, if asked for at each epoch."""
        if self._recording.when == "epoch":
            self._record(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Records, if asked for at each save."""
        if self._recording.when == "save" and trainer.state.fn == "fit":
            self._record(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Records, if asked for at the end."""
        if self._recording.when == "end":
            self._record(trainer, pl_module)

    def _record(self, trainer: Trainer, model: LightningModule) -> None:
        epoch = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
        settings = {**self._settings, "step": trainer.global_step, "epoch": epoch}
        context = trainer.precision_plugin.forward_context
        stage = trainer.state.stage
        try:
            with undisturbed(model), _running_within(context, model):
                self._recording.record(_wrapped(trainer), self._losses(trainer), _splits(trainer), settings)
        finally:
            trainer.state.stage = stage

    def _losses(self, trainer: Trainer) -> LossFunction | None:
        """The user's, in the trainer's precision."""
        own = self._recording.losses
        if own is None:
            return None

        def losses(model: nn.Module, batch: Any) -> Tensor:
            with trainer.precision_plugin.forward_context():
                return own(model, batch)

        losses.__name__ = getattr(own, "__name__", type(own).__name__)
        return losses


def _wrapped(trainer: Trainer) -> nn.Module:
    """The module in what makes several processes train it together."""
    model = trainer.strategy.model
    assert model is not None
    return model


def _require_whole_model(trainer: Trainer) -> None:
    if isinstance(trainer.strategy, (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)):
        raise RecordingError(
            f"{type(trainer.strategy).__name__} keeps a part of each parameter in each process, and recording needs "
            "whole ones. Train with another strategy, or record in one process afterwards with metaql.Recorder."
        )


def _splits(trainer: Trainer) -> dict[str, Samples]:
    """split => samples: the training set, and each validation set."""
    loaders = {"train": trainer.train_dataloader, **_validation(trainer.val_dataloaders)}
    splits = {}
    for split, loader in loaders.items():
        checked = loader_of_samples(loader, f"The dataloader of split '{split}'")
        size = getattr(checked.batch_sampler, "batch_size", None) or 1
        splits[split] = Samples(checked, size, _transfer(trainer, split), trainer.global_rank, trainer.world_size)
    return splits


def _validation(loaders: Any) -> Mapping[str, Any]:
    if loaders is None:
        return {}
    if isinstance(loaders, dict):
        if "train" in loaders:
            raise RecordingError("A validation set can't be called 'train': that is the training set's split.")
        return loaders
    several = list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]
    if len(several) == 1:
        return {"validation": several[0]}
    return {f"validation_{number}": loader for number, loader in enumerate(several)}


def _transfer(trainer: Trainer, split: str) -> Callable[[Any], Any]:
    """A batch's way to the model, as the trainer's loops have it."""
    stage = RunningStage.TRAINING if split == "train" else RunningStage.VALIDATING

    def transfer(batch: Any) -> Any:
        # The hooks may ask, and augment only what is trained on.
        trainer.state.stage = stage
        batch = trainer.precision_plugin.convert_input(batch)
        batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return trainer.strategy.batch_to_device(batch, dataloader_idx=0)

    return transfer


@contextmanager
def _running_within(context: Callable[[], AbstractContextManager[None]], model: nn.Module) -> Iterator[None]:
    """Within it the model's forward pass is in the context; half precision comes out as float32 for the loss.

    Only the forward pass: what is computed from it would be in half precision too.
    """
    forward = model.forward
    replaced = vars(model).get("forward")

    def within(*args: Any, **kwargs: Any) -> Any:
        with context():
            return map_tensors(_in_full, forward(*args, **kwargs))

    model.forward = within
    try:
        yield
    finally:
        del model.forward
        if replaced is not None:
            model.forward = replaced


def _in_full(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
