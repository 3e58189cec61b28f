"""The optimum of multinomial logistic regression, with samples left out: a part of ``bench.left_out``."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.report import require


class Optimum:
    """Where the mean of share · loss over all samples, and penalty · |weights|² / 2, is least.

    ``inputs`` float64 [samples, width]; a bias is an input that is 1. What is left out has a share of 0, and the mean
    is over as many samples as before.
    """

    def __init__(self, inputs: Tensor, labels: Tensor, classes: int, penalty: float) -> None:
        self.inputs, self.labels, self.classes, self.penalty = inputs, labels, classes, penalty
        self._squares = (inputs[:, :, None] * inputs[:, None, :]).flatten(1)

    def weights(self, shares: Tensor) -> Tensor:
        """[models, classes, width] for shares [models, samples], by Newton's method until nothing moves."""
        first = self._least(torch.ones_like(shares[0]), torch.zeros(self.classes, self.inputs.shape[1]).double())
        return torch.stack([self._least(each, first) for each in shares])

    def _least(self, share: Tensor, weights: Tensor) -> Tensor:
        for _ in range(50):
            slope, bend = self._derivatives(share, weights)
            move = torch.cholesky_solve(slope[:, None], torch.linalg.cholesky(bend)).reshape(weights.shape)
            weights = weights - move
            if move.norm() <= 1e-9 * weights.norm():
                return weights
        require(False, "Newton's method has not come to an end in 50 steps")
        return weights

    def _derivatives(self, share: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient and the Hessian."""
        chances = (self.inputs @ weights.T).softmax(1)
        scale = (share / len(share))[:, None]
        slope = ((chances - F.one_hot(self.labels, self.classes)) * scale).T @ self.inputs + self.penalty * weights
        of_logits = torch.diag_embed(chances) - chances[:, :, None] * chances[:, None, :]
        classes, width = weights.shape
        bend = ((of_logits.flatten(1) * scale).T @ self._squares).reshape(classes, classes, width, width)
        bend = bend.transpose(1, 2).reshape(classes * width, classes * width)
        bend.diagonal().add_(self.penalty)
        return slope.flatten(), bend
