"""Which rows to label next, as labels that are used for validation."""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.errors import QueryError


def candidates(
    embedding: Tensor,
    anomaly_score: Tensor,
    pseudo_label: Tensor | None = None,
    meta_gradient: Tensor | None = None,
    labelled: Tensor | None = None,
    budget: int = 20,
) -> Tensor:
    """Places int64 [budget] of the training rows to label next, the first one first.

    Of the training rows: their ``embedding`` [n, d], ``anomaly_score`` [n], ``pseudo_label`` bool [n] and
    ``meta_gradient`` [n] as ``Fitted`` has them (None without labels). ``labelled`` [m, d] is the embedding of the rows
    that have labels. No more than n places.
    """
    if budget < 1:
        raise QueryError(f"budget must be a whole number from 1 on, not {budget}")
    del pseudo_label, meta_gradient
    points = embedding.to(torch.float64)
    points = (points - points.mean(0)) / points.std().clamp(min=1e-12)
    nearest = torch.full((len(points),), float("inf"), dtype=torch.float64)
    for each in () if labelled is None else labelled.to(points):
        nearest = torch.minimum(nearest, (points - each).norm(dim=1))
    chosen: list[int] = []
    importance = anomaly_score.to(torch.float64).argsort().argsort() / len(points) + 0.1
    while len(chosen) < min(budget, len(points)):
        value = importance * (nearest if bool(nearest.isfinite().all()) else 1)
        value[chosen] = -1
        chosen.append(int(value.argmax()))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)
