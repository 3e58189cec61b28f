"""Gradients of samples that were never recorded, computed anew at a store's checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from metaql.errors import BatchError, ModelStateError
from metaql.methods.hessian import Hessian
from metaql.storage.blocks import Block, Factored, Full
from metaql.storage.manifest import CROSS_ENTROPY
from metaql.storage.recording.losses import LossFunction, ModelLosses
from metaql.storage.recording.model_state import require_repeatable
from metaql.storage.recording.sample_gradients import SampleGradients
from metaql.storage.recording.wrappers import unwrapped
from metaql.storage.store import Store
from metaql.storage.training_samples import training_samples

# Samples that second derivatives are taken of at a time.
BATCH = 256


class Replay:
    """Differentiates a copy of ``model`` with the weights of a checkpoint of the store, the newest by default.

    The model's own weights and mode stay as they are: the copy is in evaluation mode. ``losses`` is the function that
    the recorder was given.
    """

    def __init__(
        self, model: nn.Module, store: Store, losses: LossFunction | None = None, checkpoint: int | None = None
    ) -> None:
        numbers = [each.number for each in store.manifest.checkpoints]
        if not numbers or not store.layers:
            raise ModelStateError(
                f"{store.path} has no recorded checkpoint to replay a sample at. Collect at one first."
            )
        if losses is None and store.manifest.losses != CROSS_ENTROPY:
            raise ModelStateError(
                f"{store.path} records the gradients of '{store.manifest.losses}'; a replay without them "
                "would be of cross entropy. Leave out model=."
            )
        self._model = copy.deepcopy(unwrapped(model)).eval()
        self._store, self._checkpoint = store, numbers[-1] if checkpoint is None else checkpoint
        self._load(store, self._checkpoint)
        require_repeatable(self._model)
        recorded = {each.name for layer in store.layers for each in layer.parameters}
        parameters = {name: each for name, each in self._model.named_parameters() if name in recorded}
        for parameter in parameters.values():
            parameter.requires_grad_()
        dtype = store.manifest.dtype
        assert dtype is not None
        self._function, self._parameters = ModelLosses(self._model, losses), parameters
        self._gradients = SampleGradients(self._function, parameters, dtype, store.layers)
        # bfloat16 is read as float32.
        self._dtype = torch.float64 if dtype == "float64" else torch.float32
        self._device = next(iter(parameters.values())).device

    def gradient(self, inputs: Tensor, targets: Tensor) -> dict[str, Block]:
        """Each layer's block for a batch of inputs [n, ...] and targets [n, ...], as ``Store.read`` would give it."""
        if inputs.shape[:1] != targets.shape[:1] or not len(inputs):
            raise BatchError(f"{len(targets)} targets do not go with {len(inputs)} inputs.")
        batch = (inputs.to(self._device), targets.to(self._device))
        blocks = self._gradients.of(batch, np.arange(len(inputs))).blocks
        return {name: _converted(block, self._dtype) for name, block in blocks.items()}

    @property
    def checkpoint(self) -> int:
        """Whose weights these are."""
        return self._checkpoint

    def hessian(self, between: Callable[[], None] = lambda: None) -> Hessian:
        """That of the mean loss over the recorded samples of the split ``train``, in the recorded parameters.

        Its vectors are the layers' laid-out gradients one after another. QueryError where inputs or labels are
        missing. ``between`` is called before each batch, and may raise to stop.
        """
        inputs, targets = training_samples(self._store, self._checkpoint)
        batches = list(zip(inputs.to(self._device).split(BATCH), targets.to(self._device).split(BATCH), strict=True))

        def losses(parameters: Mapping[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
            between()
            weights = {f"model.{name}": value for name, value in parameters.items()}
            values: Tensor = functional_call(self._function, weights, (batch,))
            return values

        names = [each.name for layer in self._store.layers for each in layer.parameters]
        return Hessian(losses, {name: self._parameters[name] for name in names}, batches)

    def _load(self, store: Store, checkpoint: int) -> None:
        try:
            self._model.load_state_dict(store.weights(checkpoint))
        except RuntimeError as error:
            raise ModelStateError(
                f"The model does not fit the weights of checkpoint {checkpoint} of {store.path}: {error}. Pass the "
                "model that was recorded."
            ) from error


def _converted(block: Block, dtype: torch.dtype) -> Block:
    if isinstance(block, Full):
        return Full(block.gradient.to(dtype))
    return block.each(lambda part: _converted_factors(part, dtype))


def _converted_factors(block: Factored, dtype: torch.dtype) -> Factored:
    suffix = block.suffix.to(dtype) if block.suffix.is_floating_point() else block.suffix
    return Factored(suffix, block.prefix.to(dtype), block.samples, block.offsets)
