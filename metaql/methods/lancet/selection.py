"""Which rows to ask for next: those that speak for most rows without labelled neighbours.

The rows with the smallest weights alone would be as many neighbours of one outlier. A need of 1 / (1 + weight / ½) per
row says how much it lacks a labelled neighbour; each next row is the one that most shortens the distances of all rows
to their nearest label or chosen row, added up by need (greedy facility location).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.errors import QueryError
from metaql.methods.rows import require_finite

# As many rows as are compared with each other; of more, so many drawn at random stand for all.
POOL = 3000
# The weight at which a row's need has fallen to half.
HALF = 0.5


def select(
    embedding: Tensor, weight: Tensor | None, budget: int, labelled: Tensor | None = None, seed: int = 0
) -> Tensor:
    """Places int64 of ``budget`` rows to ask for, the most telling first; all if there are fewer.

    ``embedding`` [n, d] of unlabelled rows with their ``weight`` [n], None without labels; ``labelled`` [m, d] is the
    embedding of the rows that have labels. The same arguments give the same places.
    """
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
        raise QueryError(f"budget must be a whole number from 1 on, not {budget!r}")
    require_finite(embedding, "embedding")
    budget = min(budget, len(embedding))
    if budget == 0:
        return torch.empty(0, dtype=torch.int64)
    pool = _pool(len(embedding), max(POOL, budget), seed).to(embedding.device)
    points = embedding[pool].to(torch.float64)
    apart = torch.cdist(points, points)
    if labelled is not None and len(labelled) > 0:
        nearest = torch.cdist(points, labelled.to(points)).amin(1)
    else:
        nearest = apart.amax(1)
    need = torch.ones(len(pool)).to(points) if weight is None else 1 / (1 + weight[pool].to(points) / HALF)
    return pool[_chosen(apart, nearest, need, budget)]


def _pool(rows: int, most: int, seed: int) -> Tensor:
    if rows <= most:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def _chosen(apart: Tensor, nearest: Tensor, need: Tensor, budget: int) -> Tensor:
    chosen: list[int] = []
    free = torch.ones(len(apart), dtype=torch.bool, device=apart.device)
    while len(chosen) < budget:
        gains = (need @ (nearest[:, None] - apart).clamp(min=0)).masked_fill(~free, -1)
        place = int(gains.argmax())
        chosen.append(place)
        free[place] = False
        nearest = torch.minimum(nearest, apart[:, place])
    return torch.tensor(chosen, device=apart.device)
