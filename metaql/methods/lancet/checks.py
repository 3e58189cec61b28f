"""Labels that a round can't use, and why."""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.errors import QueryError


def require_labels(features: Tensor, labels: Tensor, classes: int) -> None:
    """QueryError unless there is one label a row, from -1 (unknown) to ``classes`` - 1."""
    if isinstance(classes, bool) or not isinstance(classes, int) or classes < 1:
        raise QueryError(f"classes must be a whole number from 1 on, not {classes!r}")
    if labels.shape != features.shape[:1]:
        raise QueryError(f"labels must have one value for each of {len(features)} rows, not shape {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise QueryError(f"labels must be whole numbers, -1 where unknown, not {labels.dtype}")
    wrong = (labels < -1) | (labels >= classes)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise QueryError(
            f"labels must be from 0 to {classes - 1}, or -1 where unknown; row {place} has {int(labels[place])}"
        )


def require_confidence(labels: Tensor, confidence: Tensor | None) -> None:
    """QueryError unless the confidences of labelled rows are numbers from 0 to 1, and not all 0."""
    if confidence is None:
        return
    if confidence.shape != labels.shape:
        raise QueryError(f"confidence must have one value for each of {len(labels)} rows")
    known = confidence[labels >= 0]
    if not ((known >= 0) & (known <= 1)).all():
        raise QueryError("the confidence of a labelled row must be a number from 0 to 1")
    if len(known) > 0 and not known.any():
        raise QueryError("the confidence of all labelled rows is 0: leave those labels out")
