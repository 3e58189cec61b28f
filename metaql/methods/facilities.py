"""Rows that speak for many: greedy facility location."""

from __future__ import annotations

import torch
from torch import Tensor

# As many rows as are compared with each other; of more, so many drawn at random stand for all.
POOL = 3000


def pool_of(rows: int, most: int = POOL, seed: int = 0) -> Tensor:
    """Places int64 of the rows that stand for all, in order: the same ones for the same seed."""
    if rows <= most:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def facilities(apart: Tensor, nearest: Tensor, need: Tensor, count: int, groups: Tensor | None = None) -> Tensor:
    """Places int64 [count]: each is the row that most shortens all distances to the nearest, summed by ``need``.

    Of rows whose distances from each other are ``apart`` [n, n], and from what speaks for them already ``nearest`` [n].
    With ``groups`` bool [n] they are taken from both in turn, True first, as long as there are any.
    """
    chosen: list[int] = []
    free = torch.ones(len(apart), dtype=torch.bool, device=apart.device)
    while len(chosen) < count:
        wanted = free
        if groups is not None:
            wanted = free & (groups if len(chosen) % 2 == 0 else ~groups)
        gains = need @ (nearest[:, None] - apart).clamp(min=0)
        place = int(gains.masked_fill(~(wanted if wanted.any() else free), -1).argmax())
        chosen.append(place)
        free[place] = False
        nearest = torch.minimum(nearest, apart[:, place])
    return torch.tensor(chosen, device=apart.device)
