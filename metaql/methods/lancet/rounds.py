"""A round of LANCET: embed, spread labels, weigh, say what to ask next or that it is enough."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaql.methods.lancet.checks import require_confidence, require_labels
from metaql.methods.lancet.fitted import Fitted, chances_of, fresh_module
from metaql.methods.lancet.matching_network import matched
from metaql.methods.lancet.selection import select
from metaql.methods.lancet.settings import Progress, Settings
from metaql.methods.lancet.stopping import Stop, stop_by
from metaql.methods.lancet.training import Training
from metaql.methods.random_numbers import seeded
from metaql.methods.rows import in_parts, require_rows
from metaql.methods.scaling import usual_scaling


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    settings: Settings | None = None,
    confidence: Tensor | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Fitted:
    """One round on rows [n, *shape] with ``labels`` int64 [n] from 0 to ``classes`` - 1, or -1 where unknown.

    ``confidence`` float [n] from 0 to 1 says how sure each label is. Without labels the rows to ask for are spread over
    the embedding. On a CPU the same seed and number of threads give the same result; torch's own random numbers are
    left as they are. ``progress`` is called after each batch; what it raises ends the round.

    QueryError for fewer than 2 rows, NaN or infinity, and labels or confidences that make no sense.
    """
    settings = settings or Settings()
    require_rows(features)
    require_labels(features, labels, classes)
    require_confidence(labels, confidence)
    with seeded(settings.seed):
        return _fit(features, labels.to(torch.int64), settings, confidence, progress)


def _fit(
    features: Tensor,
    labels: Tensor,
    settings: Settings,
    confidence: Tensor | None,
    progress: Callable[[Progress], None] | None,
) -> Fitted:
    # The linear model has outputs for labelled classes only: others would take unlabelled rows without any evidence.
    present = labels[labels >= 0].unique()
    known = labels >= 0
    places = torch.where(known, torch.searchsorted(present, labels), -1)
    shape = tuple(features.shape[1:])
    scaling = usual_scaling(features)
    rows = scaling(features)
    module = fresh_module(settings, shape, len(present)).to(features.device)
    sure = torch.ones(len(labels)).to(rows) if confidence is None else confidence.to(rows)
    training = Training(module, rows, places, sure, settings, progress)
    training.run()
    label, probability = _spread(chances_of(module, rows), places, present)
    weight, ask, stop = _next(in_parts(module.network, rows), known, settings)
    return Fitted(
        settings, shape, label, probability, weight, ask, present, stop, training.history, module.eval(), scaling
    )


def _spread(chances: Tensor, places: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    if len(present) == 0:
        return torch.full_like(places, -1), torch.full(places.shape, torch.nan).to(chances)
    place = torch.where(places >= 0, places, chances.argmax(1))
    return present[place], chances.gather(1, place[:, None]).squeeze(1)


def _next(points: Tensor, known: Tensor, settings: Settings) -> tuple[Tensor, Tensor, Stop]:
    weight = torch.full((len(points),), torch.nan).to(points)
    unknown = (~known).nonzero().flatten()
    if len(unknown) == 0:
        return weight, unknown, Stop(None, None, alike=False, covered=True, enough=True, now=True)
    if len(unknown) == len(points):
        return (
            weight,
            select(points, None, settings.budget),
            Stop(None, None, alike=False, covered=False, enough=False, now=False),
        )
    found = matched(points[unknown], points[known], settings.seed)
    weight[unknown] = found.unlabelled
    stop = stop_by(found.loss, float(found.unlabelled.min()), int(known.sum()), found.directions)
    return weight, unknown[select(points[unknown], found.unlabelled, settings.budget, points[known])], stop
