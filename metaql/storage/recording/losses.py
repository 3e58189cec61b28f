"""The samples' own losses: the user's function, or cross entropy of the model's logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metaql.errors import BatchError, NotFiniteError, RecordingError, SampleIdError

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class SampleLosses:
    """Losses [n], attached to the graph, and the logits [n, classes] where they are known."""

    values: Tensor
    logits: Tensor | None


class ModelLosses(nn.Module):
    """model and losses as one module from batch to losses, so that functional calls can replace weights."""

    def __init__(self, model: nn.Module, function: LossFunction | None) -> None:
        super().__init__()
        if function is not None:
            _require_takes_a_model(function)
        self.model = model
        self.function = function

    def forward(self, batch: Any) -> Tensor:
        """Losses [n]."""
        return self.evaluate(batch).values

    def evaluate(self, batch: Any) -> SampleLosses:
        """Losses [n] and, by the default cross entropy, logits."""
        if self.function is not None:
            return SampleLosses(self.function(self.model, batch), None)
        return _cross_entropy(self.model, batch)


def _require_takes_a_model(function: Any) -> None:
    """Raises if this surely is no function of (model, batch)."""
    name = getattr(function, "__name__", type(function).__name__)
    example = (
        "losses is called with (model, batch), such as lambda model, batch: "
        "cross_entropy(model(batch[0]), batch[1], reduction='none')."
    )
    if not callable(function):
        raise RecordingError(f"losses is a {name}, which can't be called. {example}")
    if isinstance(function, nn.modules.loss._Loss) or getattr(function, "__module__", "") == "torch.nn.functional":
        raise RecordingError(f"losses={name} is a function of a model's output and targets. {example}")
    try:
        inspect.signature(function).bind("model", "batch")
    except TypeError as error:
        raise RecordingError(f"losses={name} can't be called with two arguments ({error}). {example}") from None
    except ValueError:
        return  # Builtins may not tell what they take.


def require_one_per_sample(losses: Any, samples: int) -> None:
    """Raises unless losses is a tensor [samples] that gradients can be taken of."""
    if not isinstance(losses, Tensor):
        raise BatchError(f"losses returned a {type(losses).__name__}; return a tensor with one loss for each sample.")
    if losses.dim() == 1 and len(losses) != samples:
        raise SampleIdError(
            f"There are {samples} ids for a batch of {len(losses)} losses. Give one id for each sample of the batch, "
            "in its order, and let losses return one loss for each sample (of several positions, their mean or sum)."
        )
    if losses.shape != (samples,):
        raise BatchError(
            f"losses returned a tensor of shape {list(losses.shape)} for {samples} samples; return one loss for each "
            "sample, for instance with reduction='none'. A mean would hide the samples' own gradients."
        )
    if not losses.requires_grad:
        raise BatchError(
            "The losses do not depend on any trainable parameter. Is the model frozen, or run under torch.no_grad()?"
        )


def require_finite(losses: Tensor, ids: np.ndarray) -> None:
    """Raises if a loss is NaN or infinite, naming the sample."""
    broken = ~torch.isfinite(losses)
    if bool(broken.any()):
        which = int(broken.nonzero()[0])
        raise NotFiniteError(
            f"The loss of sample {ids[which]} is {losses[which].item()}. Look at its input and target, and at the "
            "learning rate if many samples are like it."
        )


def with_targets(model: nn.Module, batch: Any, draw: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A batch of the default loss with other targets: what ``draw`` makes of the model's logits and its own ones.

    Unchanged where there are no logits, which the loss itself will say best.
    """
    inputs, targets = _split(batch)
    with torch.no_grad():
        output = _call(model, inputs)
        logits = output if isinstance(output, Tensor) else _logits_of(output)
        if not isinstance(logits, Tensor) or logits.dim() < 2:
            return batch
        others = draw(logits, targets)
    return {**batch, "labels": others} if isinstance(batch, Mapping) else (inputs, others)


def _cross_entropy(model: nn.Module, batch: Any) -> SampleLosses:
    inputs, targets = _split(batch)
    output = _call(model, inputs)
    logits = output if isinstance(output, Tensor) else _logits_of(output)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise BatchError(
            "The default loss is cross entropy of the model's logits [n, classes]; this model returns "
            f"{_describe(logits)}. Pass losses=, a function of (model, batch) that returns one loss for each sample."
        )
    if targets.layout != torch.strided:
        raise BatchError(
            "The default loss, cross entropy, takes no sparse targets. Pass them as classes [n], or as "
            "targets.to_dense()."
        )
    if targets.is_floating_point() and targets.shape != logits.shape:
        raise BatchError(
            "The default loss is cross entropy, and these targets are not classes: "
            f"{_describe(targets)}. Pass losses=, a function of (model, batch) that returns one loss for each sample."
        )
    if isinstance(batch, Mapping) and logits.dim() > 2:
        raise BatchError(
            f"A loss for each position of a sample (logits {_describe(logits)}) can be reduced in several ways. Pass "
            "losses=, a function of (model, batch) that returns one loss for each sample."
        )
    if logits.dim() > 2 and _has_two_readings(logits, targets):
        raise BatchError(
            f"Logits {_describe(logits)} and targets {_describe(targets)} can be read in two ways: with the classes in "
            "dimension 1, as torch does, or in the last one, as models of sequences do. Say which by losses=, such as "
            "lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction='none').flatten(1).mean(1); where "
            "the classes are in the last, with .movedim(-1, 1) behind model(batch[0]) and behind targets of that shape."
        )
    try:
        values = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    except (RuntimeError, ValueError, IndexError) as error:
        raise BatchError(
            f"Cross entropy, the default loss, does not fit logits {_describe(logits)} and targets "
            f"{_describe(targets)}: {_first_line(error)}. Pass losses=, a function of (model, batch) that returns one "
            "loss for each sample."
        ) from error
    if values.dim() > 1:
        values = _mean_over_positions(values, targets)
    return SampleLosses(values, logits if logits.dim() == 2 else None)


def _has_two_readings(logits: Tensor, targets: Tensor) -> bool:
    """Whether classes may be in the last dimension as well as in dimension 1, where torch takes them to be."""
    return targets.is_floating_point() or targets.shape == logits.shape[:1] + logits.shape[2:] == logits.shape[:-1]


def _split(batch: Any) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping):
        if not isinstance(batch.get("labels"), Tensor):
            raise BatchError(
                "A batch that is a dict needs its classes under 'labels' for the default loss; it has "
                f"{', '.join(map(repr, batch)) or 'nothing'}. Add them, or pass losses= to the recorder."
            )
        return {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if not isinstance(batch, (list, tuple)) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise BatchError(
            "The default loss needs batches of (inputs, targets), or dicts with 'labels'; this one is "
            f"{_describe(batch)}. Pass losses=, a function of (model, batch) that returns one loss for each sample."
        )
    return batch[0], batch[1]


def _call(model: nn.Module, inputs: Any) -> Any:
    try:
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, (list, tuple)) else model(inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError) as error:
        raise BatchError(
            f"The model can't be run on this batch's inputs, {_describe(inputs)}: {_first_line(error)}. Pass batches "
            "as the model takes them, or losses=, a function of (model, batch) that returns one loss for each sample."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _logits_of(output: Any) -> Any:
    if isinstance(output, Mapping):
        return output.get("logits")
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, (list, tuple)) and output else output


def _mean_over_positions(values: Tensor, targets: Tensor) -> Tensor:
    """Each sample's mean over its positions that are not ignored (target -100), as cross_entropy does for one."""
    counted = (targets != -100) if not targets.is_floating_point() else torch.ones_like(values, dtype=torch.bool)
    return values.flatten(1).sum(1) / counted.flatten(1).sum(1)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{'an' if kind.startswith('i') else 'a'} {kind} tensor of shape {list(value.shape)}"
    if isinstance(value, (list, tuple)):
        kinds = [type(each).__name__ for each in value[:4]]
        return f"a {type(value).__name__} of {', '.join(kinds)}{', …' if len(value) > 4 else ''}"
    if isinstance(value, Mapping):
        return f"a dict of {', '.join(f'{key!r}: {_describe(each)}' for key, each in value.items())}"
    return f"a {type(value).__name__}"
