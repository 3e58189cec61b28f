"""Which rows to ask for next: those that speak for most rows without labelled neighbours.

The rows with the smallest weights alone would be as many neighbours of one outlier. A need of 1 / (1 + weight / ½) per
row says how much it lacks a labelled neighbour; each next row is the one that most shortens the distances of all rows
to their nearest label or chosen row, added up by need (greedy facility location).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.methods.facilities import POOL, facilities, pool_of
from metaql.methods.numbers import require_whole
from metaql.methods.rows import require_finite

# The weight at which a row's need has fallen to half.
HALF = 0.5


def select(
    embedding: Tensor, weight: Tensor | None, budget: int, labelled: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Places int64 of ``budget`` rows to ask for, the most telling first; all if there are fewer.

    ``embedding`` [n, d] of unlabelled rows with their ``weight`` [n], None without labels; ``labelled`` [m, d] is the
    embedding of the rows that have labels. The same arguments give the same places.
    """
    require_whole("budget", budget)
    require_finite(embedding, "embedding")
    budget = min(budget, len(embedding))
    if budget == 0:
        return torch.empty(0, dtype=torch.int64)
    pool = pool_of(len(embedding), max(POOL, budget), seed).to(embedding.device)
    points = embedding[pool].to(torch.float64)
    apart = torch.cdist(points, points)
    if labelled is not None and len(labelled) > 0:
        nearest = torch.cdist(points, labelled.to(points)).amin(1)
    else:
        nearest = apart.amax(1)
    need = torch.ones(len(pool)).to(points) if weight is None else 1 / (1 + weight[pool].to(points) / HALF)
    return pool[facilities(apart, nearest, need, budget)]
