"""What a training step goes along: ELITE's weighted batch, and what it is compared with."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from metaql.methods.elite.fitted import Epoch
from metaql.methods.elite.forward_mode import Score
from metaql.methods.elite.meta_gradients import trainable
from metaql.methods.elite.steps import Labels, gradient_of, mixed, pushing_weights, steps_for

# As many rows as show whether factors are exact.
EXAMINED = 32
# As many labelled rows as take part in one step.
LABELLED = 128
# Training ends when the validation loss has not come below its lowest by this share for so many epochs.
PATIENCE, GAIN = 5, 0.01
# So often, in epochs, rows with settled pseudo labels are asked again.
REFRESH = 5
# DeepSAD's η.
SAD_WEIGHT = 1.0
SMALLEST = 1e-6
SMALLEST_SIZE = 1e-30


class Objective(Protocol):
    """Batches of an epoch, and for each the gradient to step along with the validation loss, if there is one."""

    def batches(self, size: int, epoch: int) -> list[Tensor]: ...
    def step(self, places: Tensor) -> tuple[dict[str, Tensor], float | None]: ...
    def summary(self, epoch: int, losses: list[float]) -> Epoch: ...
    def weights(self) -> Tensor | None: ...
    def anomalous(self) -> Tensor | None: ...
    def finished(self, history: list[Epoch]) -> bool: ...


class Unsupervised:
    """The mean score of the batch."""

    def __init__(self, module: nn.Module, score: Score, rows: Tensor) -> None:
        self._module, self._score, self._rows = module, score, rows
        self._parameters = trainable(module)

    def batches(self, size: int, epoch: int) -> list[Tensor]:
        return shuffled(torch.arange(len(self._rows)), size)

    def step(self, places: Tensor) -> tuple[dict[str, Tensor], float | None]:
        return gradient_of(self._scores(self._rows[places]).mean(), self._parameters), None

    def summary(self, epoch: int, losses: list[float]) -> Epoch:
        return Epoch(epoch, sum(losses) / len(losses) if losses else None, None, None)

    def weights(self) -> Tensor | None:
        return None

    def anomalous(self) -> Tensor | None:
        return None

    def finished(self, history: list[Epoch]) -> bool:
        return False

    def _scores(self, rows: Tensor) -> Tensor:
        return self._score(self._module, rows)


class Supervised(Unsupervised):
    """The loss of the labelled rows alone, as often as there are batches."""

    def __init__(self, module: nn.Module, score: Score, rows: Tensor, labels: Labels) -> None:
        super().__init__(module, score, rows)
        self._labels = labels

    def step(self, places: Tensor) -> tuple[dict[str, Tensor], float | None]:
        labels = self._labels.drawn(LABELLED)
        loss = labels.loss(self._scores(labels.rows))
        return gradient_of(loss, self._parameters), float(loss.detach())


class DeepSAD(Supervised):
    """Deep SAD: squared distances of rows and labelled normals, and the inverse ones of labelled anomalies."""

    def step(self, places: Tensor) -> tuple[dict[str, Tensor], float | None]:
        labels = self._labels.drawn(LABELLED)
        scores = self._scores(torch.cat([self._rows[places], labels.rows]))
        squares = scores.square()
        known = squares[len(places) :]
        own = torch.where(labels.is_anomaly, 1 / (known + SMALLEST), known)
        # As if the labelled rows were among the others, each once in an epoch.
        share = len(self._labels.rows) / len(self._rows)
        loss = (squares[: len(places)].mean() + SAD_WEIGHT * share * own.mean()) / (1 + share)
        return gradient_of(loss, self._parameters), float(labels.loss(scores.detach()[len(places) :]))


class Elite:
    """Rows weighted by what their meta-gradients have said, and the labelled rows' own loss.

    A row's evidence adds up s_i / mean|s| · L_v over the epochs. When L_v nears 0 its gradient is that of few rows and
    the signs of s_i turn at random; what was said while there was much to learn then outweighs it, and rows count for
    less the less there is left to learn.

    With ``settled``, rows whose pseudo label has stayed the same for so many epochs keep the weight they had, in
    batches of their own that need neither labelled rows nor products; every few epochs all rows are asked.
    """

    def __init__(self, module: nn.Module, score: Score, rows: Tensor, labels: Labels, settled: int | None) -> None:
        self._module, self._score, self._rows, self._labels = module, score, rows, labels
        self._steps = steps_for(module, score, rows[:EXAMINED])
        self._parameters = trainable(module)
        self._settled = settled
        self._direction: dict[str, Tensor] = {}
        self._left_at_first: float | None = None
        # Places, evidence and weights of the epoch's batches, entered at its end, which is cheaper than after each.
        self._said: list[tuple[Tensor, Tensor, Tensor]] = []
        self._evidence = torch.zeros(len(rows)).to(rows)
        self._weights = torch.zeros_like(self._evidence)
        self._anomalous = self._evidence < 0
        self._unchanged = torch.full((len(rows),), -1, device=rows.device)
        self._skips = self._unchanged > 0

    def batches(self, size: int, epoch: int) -> list[Tensor]:
        self._skips = torch.zeros_like(self._anomalous)
        if self._settled is not None and epoch % REFRESH != 0:
            self._skips = self._unchanged >= self._settled
        apart = [torch.nonzero(each).flatten() for each in (self._skips, ~self._skips)]
        batches = [batch for places in apart for batch in shuffled(places, size)]
        return [batches[place] for place in torch.randperm(len(batches)).tolist()]

    def step(self, places: Tensor) -> tuple[dict[str, Tensor], float | None]:
        if self._settled is not None and self._skips[places[0]]:
            return self._settled_step(places), None

        before = self._evidence[places]

        def weigh(products: Tensor, left: float) -> Tensor:
            if self._left_at_first is None:
                self._left_at_first = max(left, SMALLEST_SIZE)
            evidence = torch.add(before, products, alpha=left / mean_size(products))
            weights = evidence * (min(1.0, left / self._left_at_first) / mean_size(evidence))
            self._said.append((places, evidence, weights))
            return weights

        step = self._steps.step(self._rows[places], self._labels.drawn(LABELLED), weigh)
        self._direction = step.direction
        return step.gradient, step.validation_loss

    def _settled_step(self, places: Tensor) -> dict[str, Tensor]:
        scores = self._score(self._module, self._rows[places])
        pushing = pushing_weights(self._weights[places], scores.detach(), self._labels.margin)
        return mixed(gradient_of((scores * pushing).mean(), self._parameters), self._direction)

    def summary(self, epoch: int, losses: list[float]) -> Epoch:
        if self._said:
            places, evidence, weights = (torch.cat(each) for each in zip(*self._said, strict=True))
            self._evidence[places], self._weights[places] = evidence, weights
            self._said.clear()
        anomalous = self._evidence < 0
        self._unchanged = torch.where(anomalous == self._anomalous, self._unchanged + 1, 0)
        self._anomalous = anomalous
        loss = sum(losses) / len(losses) if losses else None
        return Epoch(epoch, loss, float(anomalous.float().mean()), float(self._skips.float().mean()))

    def weights(self) -> Tensor | None:
        return self._weights

    def anomalous(self) -> Tensor | None:
        return self._anomalous

    def finished(self, history: list[Epoch]) -> bool:
        """Whether the validation loss has come to its end."""
        losses = [each.validation_loss for each in history if each.validation_loss is not None]
        earlier, latest = losses[:-PATIENCE], losses[-PATIENCE:]
        return bool(earlier) and min(latest) > min(earlier) - GAIN * abs(min(earlier))


def mean_size(values: Tensor) -> float:
    """The mean of the sizes of these numbers, by which they are divided, so that no scale has to be tuned."""
    return max(float(values.abs().mean()), SMALLEST_SIZE)


def shuffled(places: Tensor, size: int) -> list[Tensor]:
    """The places in random order, in batches of at most ``size`` that are as alike in size as can be."""
    if len(places) == 0:
        return []
    order = places[torch.randperm(len(places)).to(places.device)]
    return list(order.tensor_split(-(-len(places) // size)))
