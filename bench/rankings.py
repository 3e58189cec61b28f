"""How well scores agree, and how well they find what is marked."""

from __future__ import annotations

import torch
from torch import Tensor


def ranks(scores: Tensor) -> Tensor:
    """Places from 0 along the last dimension, float64; equal scores share the mean of theirs."""
    ordered, order = scores.double().contiguous().sort(dim=-1)
    first = torch.searchsorted(ordered, ordered, side="left")
    last = torch.searchsorted(ordered, ordered, side="right") - 1
    return torch.empty_like(ordered).scatter_(-1, order, (first + last).double() / 2)


def spearman(one: Tensor, other: Tensor) -> Tensor:
    """Rank correlation along the last dimension; NaN where all scores are equal."""
    centred = [each - each.mean(-1, keepdim=True) for each in (ranks(one), ranks(other))]
    return (centred[0] * centred[1]).sum(-1) / (centred[0].norm(dim=-1) * centred[1].norm(dim=-1))


def precision(scores: Tensor, marked: Tensor, first: int | None = None) -> float:
    """The share of marked ones among the ``first`` largest scores; among as many as are marked by default."""
    return float(marked[scores.argsort(descending=True)[: first or int(marked.sum())]].double().mean())


def auc(scores: Tensor, marked: Tensor) -> float:
    """The share of pairs of a marked and another one in which the marked one scores higher; equal scores count half."""
    found, others = int(marked.sum()), int((~marked).sum())
    return float((ranks(scores)[marked].sum() - found * (found - 1) / 2) / (found * others))
