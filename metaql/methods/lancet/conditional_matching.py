"""Conditional feature matching (Eq. 27): a class lies in one place, whether its rows have labels or not."""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 1e-6


def conditional_feature_matching(
    labelled: Tensor, labels: Tensor, confidence: Tensor, unlabelled: Tensor, predicted: Tensor, classes: int
) -> Tensor:
    """The mean absolute difference between the centres of a class's labelled points and of those predicted to be in it.

    Labelled points [m, d] count as much as confidence [m] says, and unlabelled ones are [n, d]; the mean is over
    the classes that have both, and 0 if none has. Attraction only: pushing different classes apart, as Eq. 27 allows,
    made embeddings worse, and the cross entropy does it already.
    """
    known, known_count = _centres(labelled, labels, confidence, classes)
    found, found_count = _centres(unlabelled, predicted, torch.ones_like(unlabelled[:, 0]), classes)
    both = ((known_count > 0) & (found_count > 0)).to(labelled)
    apart = (known - found).abs().mean(1)
    return (apart * both).sum() / both.sum().clamp(min=1)


def _centres(points: Tensor, classes_of: Tensor, share: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    member = torch.nn.functional.one_hot(classes_of, classes).to(points) * share[:, None]
    count = member.sum(0)
    return member.T @ points / count.clamp(min=SMALLEST)[:, None], count
