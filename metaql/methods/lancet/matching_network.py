"""The distribution matching network with online weight approximation (Algorithm 2): which rows lack labels near them.

Small networks tell labelled rows from unlabelled ones, with weights w on the latter. After each step the weights of the
step's rows are replaced by their cross entropy CE_u, divided by its mean, so that w is large where rows look labelled.
With p_l and p_u as densities that has its fixed point at c·w = ln(1 + (p_l / p_u) / w), which grows with the ratio.

A network that has been trained on a row knows it by heart. Rows are therefore weighed by networks that have not seen
them: three times over, the rows are dealt into three parts, and each part is judged by the network trained on the rest.
All nine are trained at once, as one batch of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.random_numbers import seeded
from metaql.methods.rows import require_finite

PARTS, TIMES = 3, 3
HIDDEN = 32
STEPS = 100
LEARNING_RATE = 3e-3
# Strong, since a few dozen labelled rows say little about a density.
DECAY, DROPOUT = 3.0, 0.5
SMALLEST_BATCH, BATCH = 64, 256
# Directions are kept until they hold so much of the variance, and no more than so many.
VARIANCE, DIRECTIONS = 0.95, 32
# Beyond so many deviations a value says no more.
FAR = 5.0


@dataclass(frozen=True)
class Weights:
    """``unlabelled`` float32 [n] with mean 1, and ``loss``: mean(w·CE_u) + mean(CE_l) on rows not trained on.

    The loss is 2 ln 2 where labelled and unlabelled rows can't be told apart. ``directions`` is how many the points
    were looked at in.
    """

    unlabelled: Tensor
    loss: float
    directions: int


def weights(unlabelled_embedding: Tensor, labelled_embedding: Tensor, seed: int = 0) -> Tensor:
    """float32 [n] with mean 1 for unlabelled points [n, d]: the larger, the more labelled points [m, d] there are near.

    It orders points as the ratio of the two densities does. The same seed gives the same; torch's own random numbers
    are left as they are. QueryError for no points at all, dimensions that differ, NaN or infinity.
    """
    return matched(unlabelled_embedding, labelled_embedding, seed).unlabelled


def matched(unlabelled: Tensor, labelled: Tensor, seed: int = 0) -> Weights:
    """What ``weights`` gives, with the loss that it came to."""
    for name, points in (("unlabelled_embedding", unlabelled), ("labelled_embedding", labelled)):
        if points.ndim != 2 or points.numel() == 0:
            raise QueryError(f"{name} must be points [n, d], one at least, not of shape {list(points.shape)}")
        require_finite(points, name)
    if unlabelled.shape[1] != labelled.shape[1]:
        raise QueryError(
            f"unlabelled points have {unlabelled.shape[1]} dimensions, and labelled ones {labelled.shape[1]}"
        )
    with seeded(seed):
        return _matched(*_inputs(unlabelled, labelled))


def _inputs(unlabelled: Tensor, labelled: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides' points along the main directions, of deviation 1, and beside them how far out a point is.

    With the distance a network need not learn from a few dozen points that a cloud is narrower than another.
    """
    points = torch.cat([unlabelled, labelled]).to(torch.float64)
    deviation = points.std(0, correction=0)
    points = (points - points.mean(0)) / torch.where(deviation > 0, deviation, torch.inf)
    variances, directions = torch.linalg.eigh(points.T @ points / len(points))
    variances, directions = variances.flip(0).clamp(min=0), directions.flip(1)
    shares = variances.cumsum(0) / variances.sum().clamp(min=torch.finfo(torch.float64).tiny)
    kept = min(int((shares < VARIANCE).sum()) + 1, DIRECTIONS, int((variances > 1e-9).sum()))
    scaled = (points @ directions[:, :kept] / variances[:kept].sqrt()).clamp(-FAR, FAR)
    distance = (scaled.square().sum(1, keepdim=True) - kept) / max(1, 2 * kept) ** 0.5
    both = torch.cat([scaled, distance], 1).float()
    return both[: len(unlabelled)], both[len(unlabelled) :]


class Networks(nn.Module):
    """PARTS · TIMES networks side by side: a linear model and a hidden layer beside it, which starts with no say."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        count = PARTS * TIMES
        self.linear = nn.Parameter(torch.zeros(count, inputs, 1))
        self.hidden = nn.Parameter(torch.randn(count, inputs, HIDDEN) / inputs**0.5)
        self.output = nn.Parameter(torch.zeros(count, HIDDEN, 1))
        self.hidden_bias = nn.Parameter(torch.zeros(count, 1, HIDDEN))
        self.bias = nn.Parameter(torch.zeros(count, 1, 1))

    def forward(self, points: Tensor) -> Tensor:
        """Logits [networks, n] of "labelled" for points [networks, n, inputs], each network's own."""
        hidden = F.dropout(torch.tanh(points @ self.hidden + self.hidden_bias), DROPOUT, self.training)
        logits: Tensor = hidden @ self.output + points @ self.linear + self.bias
        return logits.squeeze(2)

    def adam(self) -> torch.optim.Optimizer:
        decayed = {"params": [self.linear, self.hidden, self.output], "weight_decay": DECAY}
        free = {"params": [self.hidden_bias, self.bias], "weight_decay": 0.0}
        return torch.optim.AdamW([decayed, free], lr=LEARNING_RATE)


def _matched(unlabelled: Tensor, labelled: Tensor) -> Weights:
    networks = Networks(unlabelled.shape[1])
    adam = networks.adam()
    kept_back = _kept_back(len(unlabelled)), _kept_back(len(labelled))
    allowed = [_allowed(each) for each in kept_back]
    current = torch.ones(PARTS * TIMES, len(unlabelled))
    size = min(BATCH, max(SMALLEST_BATCH, len(labelled)))
    for _ in range(STEPS):
        places, known = (torch.multinomial(each, size, replacement=True) for each in allowed)
        rows = unlabelled[places]
        step(networks, adam, rows, labelled[known], current.gather(1, places))
        current.scatter_(1, places, replaced(networks, rows))
    return _judged(networks.eval(), unlabelled, labelled, *kept_back)


def step(
    networks: nn.Module, adam: torch.optim.Optimizer, unlabelled: Tensor, labelled: Tensor, current: Tensor
) -> None:
    """One step down mean(w·CE_u) + mean(CE_l) of each network."""
    loss = (current * F.softplus(networks(unlabelled))).mean(1) + F.softplus(-networks(labelled)).mean(1)
    adam.zero_grad()
    loss.sum().backward()
    adam.step()


def replaced(networks: nn.Module, unlabelled: Tensor) -> Tensor:
    """The weights that take the place of those before: the cross entropy after the step, with mean 1."""
    with torch.no_grad():
        entropy = F.softplus(networks(unlabelled))
    return entropy / entropy.mean(1, keepdim=True)


def _kept_back(rows: int) -> Tensor:
    """bool [networks, rows]: which rows a network is not trained on and judges."""
    dealt = torch.stack([torch.randperm(rows) % PARTS for _ in range(TIMES)])
    return (dealt[:, None] == torch.arange(PARTS)[:, None]).flatten(0, 1)


def _allowed(kept_back: Tensor) -> Tensor:
    """Chances float32 [networks, rows] to be drawn. Where nothing else is left, it is what a network judges."""
    allowed = (~kept_back).float()
    allowed[allowed.sum(1) == 0] = 1
    return allowed


def _judged(
    networks: nn.Module, unlabelled: Tensor, labelled: Tensor, unseen: Tensor, labelled_unseen: Tensor
) -> Weights:
    count = PARTS * TIMES
    with torch.no_grad():
        entropy = F.softplus(networks(unlabelled.expand(count, -1, -1)))
        labelled_entropy = F.softplus(-networks(labelled.expand(count, -1, -1)))
    # Each network's mean is over all rows, so that the networks' weights have one scale.
    judged = (entropy / entropy.mean(1, keepdim=True) * unseen).sum(0) / TIMES
    judged = judged / judged.mean()
    loss = (judged * (entropy * unseen).sum(0) / TIMES).mean() + (labelled_entropy * labelled_unseen).sum(
        0
    ).mean() / TIMES
    return Weights(judged, float(loss), unlabelled.shape[1] - 1)
