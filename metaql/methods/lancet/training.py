"""The embedding's training: labelled, unlabelled and made-up rows in every mini-batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor

from metaql.errors import QueryError
from metaql.methods.lancet.fitted import Epoch
from metaql.methods.lancet.networks import Generator
from metaql.methods.lancet.objectives import Embedded, feature_matching, labelled_loss, matching, real_or_made_up
from metaql.methods.lancet.settings import Progress, Settings

BATCH, LABELLED_BATCH = 100, 64
STEPS = 700
LEARNING_RATE, MOMENTA = 1e-3, (0.5, 0.999)
# For rows that are embeddings already only a linear model is learnt.
LINEAR_RATE, DECAY = 1e-2, 1e-2
# The model that is kept is the average over about so many steps, since that of one step depends on its batch.
AVERAGED = 100


class Training:
    """Goes through scaled rows [n, *shape] in mini-batches; ``labels`` [n] has -1 where unknown.

    ``embedded`` ends as the average of what it was over the last steps.
    """

    def __init__(
        self,
        embedded: Embedded,
        rows: Tensor,
        labels: Tensor,
        confidence: Tensor,
        settings: Settings,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.history: list[Epoch] = []
        self._embedded, self._rows, self._labels, self._confidence = embedded, rows, labels, confidence
        self._settings, self._progress = settings, progress
        self._known = (labels >= 0).nonzero().flatten()
        self._steps = 0
        self._averaged = deepcopy(embedded)
        rate, decay = (LINEAR_RATE, DECAY) if settings.embedding == "ready" else (LEARNING_RATE, 0.0)
        self._adam = torch.optim.AdamW(embedded.parameters(), rate, MOMENTA, weight_decay=decay)
        self._generator = None
        if settings.embedding == "semigan":
            self._generator = Generator(tuple(rows.shape[1:])).to(rows.device)
            self._generator_adam = torch.optim.Adam(self._generator.parameters(), LEARNING_RATE, MOMENTA)

    def run(self) -> None:
        batches = -(-len(self._rows) // BATCH)
        epochs = self._settings.epochs or -(-STEPS // batches)
        self._embedded.train()
        for epoch in range(1, epochs + 1):
            losses = []
            for batch, places in enumerate(torch.randperm(len(self._rows)).tensor_split(batches), 1):
                losses.append(self._step(places.to(self._rows.device)))
                if not math.isfinite(losses[-1]):
                    raise QueryError(f"the training diverged in epoch {epoch}: are the features on very odd scales?")
                if self._progress is not None:
                    self._progress(Progress(epoch, epochs, batch, batches, losses[-1]))
            self.history.append(Epoch(epoch, sum(losses) / len(losses)))
        self._embedded.load_state_dict(self._averaged.state_dict())

    def _step(self, places: Tensor) -> float:
        points, logits = self._embedded(self._rows[places])
        loss = logits.sum() * 0
        if len(self._known) > 0:
            known = self._drawn()
            known_points, known_logits = self._embedded(self._rows[known])
            labels = self._labels[known]
            loss = loss + labelled_loss(known_logits, labels, self._confidence[known])
            loss = loss + matching(known_points, labels, self._confidence[known], points, logits)
        if self._generator is not None:
            made_up = self._generator(BATCH)
            loss = loss + real_or_made_up(logits, self._embedded(made_up.detach())[1])
        _take(self._adam, loss)
        if self._generator is not None:
            self._generator_step(points.detach(), made_up)
        self._average()
        return float(loss.detach())

    def _generator_step(self, points: Tensor, made_up: Tensor) -> None:
        for parameter in self._embedded.parameters():
            parameter.requires_grad_(False)
        _take(self._generator_adam, feature_matching(points, self._embedded.network(made_up)))
        for parameter in self._embedded.parameters():
            parameter.requires_grad_(True)

    def _drawn(self) -> Tensor:
        if len(self._known) <= LABELLED_BATCH:
            return self._known
        return self._known[torch.randint(len(self._known), (LABELLED_BATCH,)).to(self._known.device)]

    def _average(self) -> None:
        self._steps += 1
        share = 1 / min(self._steps, AVERAGED)
        with torch.no_grad():
            for kept, current in zip(
                self._averaged.state_dict().values(), self._embedded.state_dict().values(), strict=True
            ):
                kept.lerp_(current, share) if kept.is_floating_point() else kept.copy_(current)


def _take(adam: torch.optim.Optimizer, loss: Tensor) -> None:
    adam.zero_grad()
    loss.backward()
    adam.step()
