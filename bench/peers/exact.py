"""What scores have to be, and how far some are from it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers.case import Case, Samples

TOGETHER = 64


def scores(case: Case) -> list[Tensor]:
    """For each set of query samples, float64 [training samples, query samples]: autograd, one sample at a time."""
    model = case.model().double()
    queries = [_gradients(model, samples) for samples in case.queries]
    parts: list[list[Tensor]] = [[] for _ in queries]
    for batch in zip(*(each.split(TOGETHER) for each in case.train), strict=True):
        train = _gradients(model, batch)
        for part, query in zip(parts, queries, strict=True):
            part.append(train @ query.T)
    return [torch.cat(part) for part in parts]


def _gradients(model: nn.Module, samples: Samples) -> Tensor:
    rows = []
    for image, label in zip(*samples, strict=True):
        loss = F.cross_entropy(model(image[None].double()), label[None])
        rows.append(torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))]))
    return torch.stack(rows)


def error(found: Tensor, expected: Tensor) -> float:
    """The norm of the known scores' differences, as a part of these scores' norm.

    Not the largest difference: of ten thousand samples one has a unit so close to zero that float32 takes it to the
    other side, which every library does alike.
    """
    known = ~found.isnan()
    difference = (found.double() - expected)[known].nan_to_num(posinf=math.inf)
    return float(difference.norm() / expected[known].norm())


def has_ten_best(found: Tensor, expected: Tensor, tolerance: float = 1e-3) -> bool:
    """Whether the known scores are ten for each query sample, and as large as its ten largest."""
    known = ~found.isnan()
    if not bool((known.sum(0) == min(10, len(expected))).all()):
        return False
    largest = expected.topk(min(10, len(expected)), dim=0).values
    best = expected.T[known.T].reshape(expected.shape[1], -1).T.sort(dim=0, descending=True).values
    return float((best - largest).norm()) <= tolerance * float(largest.norm())


def spearman(found: Tensor, expected: Tensor) -> float:
    """The correlation of the training samples' ranks, on average over the query samples."""
    one, other = (each.double().argsort(0).argsort(0).double() for each in (found, expected))
    one, other = one - one.mean(0), other - other.mean(0)
    return float(((one * other).sum(0) / (one.norm(dim=0) * other.norm(dim=0))).mean())
