"""The samples' own losses where a model computes one loss for a batch, as those of transformers do.

Nothing is taken for granted: a formula is used after it gave, for samples alone, what the trainer's own loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metaql.errors import BatchError, RecordingError
from metaql.storage.recording.batches import take
from metaql.storage.recording.losses import LossFunction

IGNORED = -100
# How many samples of the first batch are compared.
COMPARED = 3

# Of logits, labels and, for some, smoothing.
Formula = Callable[..., Tensor]


def next_token_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Losses [n] of causal language models: each position tells the next one's token."""
    return token_cross_entropy(logits[:, :-1], labels[:, 1:], smoothing)


def token_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Losses [n]: each sample's mean over its own labelled tokens, 0 where it has none."""
    values = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none", label_smoothing=smoothing
    )
    counted = (labels != IGNORED).sum(1).clamp(min=1)
    return values.view(labels.shape).sum(1) / counted


def class_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Losses [n] of one class for each sample."""
    return F.cross_entropy(logits, labels.view(-1), reduction="none", label_smoothing=smoothing)


def squared_error(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [n] of regression: the mean over a sample's own targets."""
    return (logits - labels.view_as(logits)).square().flatten(1).mean(1)


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Losses [n] of several yes-or-no labels for each sample: the mean over them."""
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="none").flatten(1).mean(1)


class OfLogits:
    """A function of (model, batch) that returns the formula's losses [n] of the model's logits.

    ``labelled`` models are given the labels too: encoder-decoders make the decoder's input of them.
    """

    def __init__(self, formula: Formula, smoothing: float, labelled: bool) -> None:
        self._formula = partial(formula, smoothing=smoothing) if smoothing else formula
        self._labelled = labelled
        # What the store keeps of it, so that it is continued only with the same.
        self.__name__ = f"{formula.__name__}_smoothed_{smoothing:g}" if smoothing else formula.__name__

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        logits = logits_of(model, batch, self._labelled)
        # In what the models compute their own losses.
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        return self._formula(logits, batch["labels"])


def logits_of(model: nn.Module, batch: Any, labelled: bool) -> Any:
    """What the model calls its logits."""
    output = model(**(batch if labelled else {key: value for key, value in batch.items() if key != "labels"}))
    if isinstance(output, Mapping):
        return output.get("logits")
    return output[int(labelled)] if isinstance(output, tuple) else output


def losses_like(
    own_loss: Callable[[Any], Tensor],
    model: nn.Module,
    batch: Any,
    samples: int,
    *,
    shifted: bool,
    labelled: bool,
    smoothing: float,
) -> LossFunction | None:
    """The samples' own losses that ``own_loss`` of a batch with one sample is; None for the recorder's default.

    ``shifted`` tells which of two formulas of tokens comes first. Raises RecordingError where none agrees.
    """
    _require_cut(batch, samples)
    compared = _compared(own_loss, batch, samples)
    with torch.no_grad():
        logits = logits_of(model, compared[0][0], labelled)
    for formula in _formulas(logits, compared[0][0]["labels"], shifted, bool(smoothing)):
        losses = OfLogits(formula, smoothing, labelled)
        if all(_agree(losses, model, one, expected) for one, expected in compared):
            plain = formula is class_cross_entropy and not smoothing and batch["labels"].dim() == 1
            return None if plain else losses
    raise RecordingError(
        f"The loss that {type(model).__name__} is trained with is none of those that are known for one sample: cross "
        "entropy of classes or of tokens, squared error, binary cross entropy, each a plain mean. (A compute_loss of "
        "your own, compute_loss_func, class weights and auxiliary losses are.) Pass losses=, a function of (model, "
        "batch) that returns one loss for each sample."
    )


def _require_cut(batch: Any, samples: int) -> None:
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        raise BatchError(
            "The collator's batches are not dicts with a tensor of 'labels'. Pass losses=, a function of (model, "
            "batch) that returns one loss for each sample."
        )
    if labels.dim() == 0 or len(labels) != samples:
        raise BatchError(
            f"The collator makes 'labels' of shape {list(labels.shape)} for {samples} samples; a sample has no row of "
            "its own there, as in batches packed without padding. Use a collator that pads."
        )


def _compared(own_loss: Callable[[Any], Tensor], batch: Any, samples: int) -> list[tuple[Any, Tensor]]:
    """The first few samples, each as a batch, whose own loss is a number."""
    found: list[tuple[Any, Tensor]] = []
    for sample in range(samples):
        one = take(batch, samples, [sample])
        with torch.no_grad():
            loss = own_loss(dict(one)).detach()
        # It is none without labelled tokens.
        if bool(torch.isfinite(loss)):
            found.append((one, loss))
        if len(found) == COMPARED:
            break
    if not found:
        raise BatchError("No sample of the first batch has a loss that is a number. Look at the labels.")
    return found


def _formulas(logits: Any, labels: Tensor, shifted: bool, smoothed: bool) -> Iterator[Formula]:
    """Those that fit the shapes of logits and labels."""
    if not isinstance(logits, Tensor):
        return
    if not labels.is_floating_point() and logits.dim() == 3 and labels.shape == logits.shape[:2]:
        yield from (next_token_cross_entropy, token_cross_entropy) if shifted else (token_cross_entropy,)
        yield from () if shifted else (next_token_cross_entropy,)
    if not labels.is_floating_point() and logits.dim() == 2 and labels.numel() == len(logits) and logits.shape[1] > 1:
        yield class_cross_entropy
    if logits.numel() == labels.numel() and not smoothed:
        yield squared_error
        yield binary_cross_entropy


def _agree(losses: LossFunction, model: nn.Module, one: Any, expected: Tensor) -> bool:
    with torch.no_grad():
        got = losses(model, one)
    # The coarser of the two: models in float64 may well compute their loss in float32.
    tolerance = 1e-4 if torch.finfo(expected.dtype).eps < 1e-3 else 3e-2
    return got.shape == (1,) and torch.allclose(got.double(), expected.double().reshape(1), tolerance, 1e-6)
