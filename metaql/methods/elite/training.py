"""ELITE's training loop (Algorithm 1), and those of the detectors that it is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.elite.checks import require_labels, require_scores
from metaql.methods.elite.detectors import SVDD, Detector, find_detector
from metaql.methods.elite.fitted import Epoch, Fitted, fresh_module
from metaql.methods.elite.meta_gradients import trainable
from metaql.methods.elite.objectives import EXAMINED, DeepSAD, Elite, Objective, Supervised, Unsupervised
from metaql.methods.elite.settings import WITHOUT_META_GRADIENTS, Progress, Settings
from metaql.methods.elite.steps import Labels, gradient_of, steps_for
from metaql.methods.random_numbers import seeded
from metaql.methods.rows import ROWS, in_parts, require_rows
from metaql.methods.scaling import usual_scaling

EPOCHS = 15
# Small sets are gone through more often, until there were so many steps.
STEPS = 600


def fit(
    features: Tensor,
    labelled: Tensor | None = None,
    is_anomaly: Tensor | None = None,
    settings: Settings | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """Trains a detector on rows [n, *shape], and with ELITE if there are labelled rows [m, *shape] and is_anomaly [m].

    Without labelled rows it is the plain unsupervised detector. float64 features lose no precision before they are
    scaled. On a CPU the same seed and number of threads give the same result; torch's own random numbers are left as
    they are, and trainings in several threads take turns. ``progress`` is called after each batch; what it raises ends
    the training.

    QueryError for fewer than 2 rows, shapes that differ, NaN or infinity, labels of one class only, and detectors
    that need labels and have none.
    """
    settings = settings or Settings()
    detector = find_detector(settings)
    require_rows(features)
    if labelled is not None and len(labelled) == 0:
        labelled = None
    if labelled is not None:
        require_labels(features, labelled, is_anomaly)
    elif settings.detector in WITHOUT_META_GRADIENTS:
        raise QueryError(f"detector '{settings.detector}' learns from labels: give some labelled rows")
    with seeded(settings.seed):
        return _fit(features, labelled, is_anomaly, settings, detector, progress)


def _fit(
    features: Tensor,
    labelled: Tensor | None,
    is_anomaly: Tensor | None,
    settings: Settings,
    detector: Detector,
    progress: Callable[[Progress], None] | None,
) -> Fitted:
    shape = tuple(features.shape[1:])
    module = fresh_module(detector, shape, settings).to(features.device)
    scaling = usual_scaling(features)
    rows = scaling(features)
    prepare(module, rows)
    require_scores(detector.score(module.eval(), rows[:2]), settings.detector)
    labels = None
    if labelled is not None:
        assert is_anomaly is not None
        known = scaling(labelled)
        margin = float(scores_of(module, detector, known).max())
        labels = Labels.of(known, is_anomaly.to(torch.bool), margin)
    objective = _objective(module, detector, rows, labels, settings)
    training = Training(module, objective, rows, settings, progress)
    training.run()
    scores = scores_of(module, detector, rows)
    products = None if labels is None else final_products(module, detector, rows, labels)
    return Fitted(
        settings,
        shape,
        anomaly_score=scores.float(),
        pseudo_label=objective.anomalous() if products is None or objective.anomalous() is not None else products < 0,
        meta_gradient=None if products is None else (-settings.learning_rate * products).float(),
        weight=objective.weights(),
        history=training.history,
        module=module.eval(),
        scaling=scaling,
    )


def _objective(
    module: nn.Module, detector: Detector, rows: Tensor, labels: Labels | None, settings: Settings
) -> Objective:
    if labels is None:
        return Unsupervised(module, detector.score, rows)
    if settings.detector == "deepsad":
        return DeepSAD(module, detector.score, rows, labels)
    if settings.detector == "supervised":
        return Supervised(module, detector.score, rows, labels)
    module.train()
    return Elite(module, detector.score, rows, labels, settings.settled)


def prepare(module: nn.Module, rows: Tensor) -> None:
    """Lets a detector look at the rows before it is trained, as Deep SVDD does for its centre."""
    if isinstance(module, SVDD):
        module.eval()
        module.prepare(rows)


def scores_of(module: nn.Module, detector: Detector, rows: Tensor) -> Tensor:
    """The scores [n] of scaled rows, each by itself."""
    module.eval()
    return in_parts(lambda part: detector.score(module, part), rows)


def final_products(module: nn.Module, detector: Detector, rows: Tensor, labels: Labels) -> Tensor:
    """⟨∇Ω(x_i), G⟩ [n] with the network as it is now, and G over all labelled rows."""
    module.eval()
    direction = gradient_of(labels.loss(detector.score(module, labels.rows)), trainable(module))
    steps = steps_for(module, detector.score, rows[:EXAMINED])
    return torch.cat([steps.products(part, direction) for part in rows.split(ROWS)])


class Training:
    """Goes through the rows in mini-batches and takes the objective's steps with Adam."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        rows: Tensor,
        settings: Settings,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.history: list[Epoch] = []
        self._objective, self._module = objective, module
        self._rows, self._settings, self._progress = rows, settings, progress
        self._parameters = trainable(module)
        self._adam = torch.optim.Adam(self._parameters.values(), settings.learning_rate)
        batches = -(-len(rows) // settings.batch_size)
        self._epochs = settings.epochs or max(EPOCHS, -(-STEPS // batches))

    def run(self) -> None:
        self._module.train()
        for epoch in range(1, self._epochs + 1):
            batches = self._objective.batches(self._settings.batch_size, epoch)
            losses = [self._step(epoch, place, batches) for place in range(len(batches))]
            self.history.append(self._objective.summary(epoch, [each for each in losses if each is not None]))
            if self._objective.finished(self.history):
                break

    def _step(self, epoch: int, place: int, batches: list[Tensor]) -> float | None:
        gradient, loss = self._objective.step(batches[place])
        for name, parameter in self._parameters.items():
            parameter.grad = gradient.get(name)
        self._adam.step()
        if loss is not None and not math.isfinite(loss):
            raise QueryError(f"the training diverged in epoch {epoch}: try a smaller learning_rate")
        if self._progress is not None:
            self._progress(Progress(epoch, self._epochs, place + 1, len(batches), loss))
        return loss
