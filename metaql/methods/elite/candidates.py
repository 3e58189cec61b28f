"""Which rows to label next, as labels that are used for validation.

A label is worth what it changes: L_v's gradient G, by whose sign of ⟨∇Ω_i, G⟩ all rows are judged. Three things count.
*Doubt*: where |⟨∇Ω_i, G⟩| is large, G points that way already, and a label would say what is known; it is the rows near
0 whose pseudo label another label turns. *Coverage*: a label speaks for the rows that the network maps near it, and not
for an outlier alone nor for rows that a label or another candidate speaks for already. *Both classes*: G is made of
normals and anomalies by halves, so candidates are taken from pseudo normals and pseudo anomalies in turn; the highest
scores would be anomalies alone, of the kind that the labels show already.

Together: each next candidate is the row that most shortens the rows' distances to their nearest label or candidate,
added up with their doubt as weight (greedy facility location).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.errors import QueryError
from metaql.methods.facilities import POOL, facilities, pool_of
from metaql.methods.numbers import require_whole

# Without labels, rows from here on count as likely anomalies.
UPPER_SCORES = 0.75


def candidates(
    embedding: Tensor,
    anomaly_score: Tensor,
    pseudo_label: Tensor | None = None,
    meta_gradient: Tensor | None = None,
    labelled: Tensor | None = None,
    budget: int = 20,
) -> Tensor:
    """Places int64 of ``budget`` training rows to label next, at most 3,000; all rows if there are fewer.

    Of the training rows: their ``embedding`` [n, d], ``anomaly_score`` [n], and ``pseudo_label`` bool [n] and
    ``meta_gradient`` [n] as ``Fitted`` has them, None without labels. ``labelled`` [m, d] is the embedding of the rows
    that have labels. The same arguments give the same places.
    """
    require_whole("budget", budget)
    budget = min(budget, len(embedding))
    if budget > POOL:
        raise QueryError(f"budget must be {POOL:,} at most, since so many rows are compared with each other")
    pool = pool_of(len(embedding))
    points = embedding[pool].to(torch.float64)
    apart = torch.cdist(points, points)
    if labelled is not None and len(labelled) > 0:
        nearest = torch.cdist(points, labelled.to(points)).amin(1)
    else:
        nearest = apart.amax().expand(len(apart))
    doubt = _doubt(None if meta_gradient is None else meta_gradient[pool].to(points), points)
    scores = anomaly_score[pool].to(points)
    anomalous = scores > scores.quantile(UPPER_SCORES) if pseudo_label is None else pseudo_label[pool]
    return pool[facilities(apart, nearest, doubt, budget, groups=anomalous)]


def _doubt(meta_gradient: Tensor | None, points: Tensor) -> Tensor:
    """From 1, where the sign may turn, towards 0."""
    if meta_gradient is None:
        return torch.ones(len(points)).to(points)
    size = meta_gradient.abs()
    return 1 / (1 + size / size.mean().clamp(min=torch.finfo(size.dtype).tiny))
