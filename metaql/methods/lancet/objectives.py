"""What the embedding and the linear model on it are trained on, jointly."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from metaql.methods.lancet.conditional_matching import conditional_feature_matching


class Embedded(nn.Module):
    """A network and the linear model on its points, which is what spreads labels: logits of the labelled classes."""

    def __init__(self, network: nn.Module, dimensions: int, classes: int) -> None:
        super().__init__()
        self.network = network
        self.linear = nn.Linear(dimensions, classes)

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Points [n, d] and logits [n, classes]."""
        points = self.network(rows)
        return points, self.linear(points)


def labelled_loss(logits: Tensor, labels: Tensor, confidence: Tensor) -> Tensor:
    """The cross entropy of labelled rows, each weighted by how sure its label is; 0 if there are none."""
    entropy = F.cross_entropy(logits, labels, reduction="none")
    return (entropy * confidence).sum() / confidence.sum().clamp(min=1e-6)


def real_or_made_up(unlabelled: Tensor, generated: Tensor) -> Tensor:
    """½ (-log P(real | unlabelled)) + ½ (-log P(made up | generated)) by logits [n, classes].

    The logit of "real" is their logsumexp, so that a class more, "made up", has the logit 0 (SemiGAN).
    """
    real = F.softplus(-unlabelled.logsumexp(1)).mean()
    made_up = F.softplus(generated.logsumexp(1)).mean()
    return 0.5 * (real + made_up)


def feature_matching(points: Tensor, generated: Tensor) -> Tensor:
    """How far the mean of made-up rows' points is from that of rows'."""
    return (points.mean(0) - generated.mean(0)).abs().mean()


def matching(known: Tensor, labels: Tensor, confidence: Tensor, points: Tensor, logits: Tensor) -> Tensor:
    """Conditional feature matching, with each row in the class that the linear model says."""
    return conditional_feature_matching(known, labels, confidence, points, logits.detach().argmax(1), logits.shape[1])
