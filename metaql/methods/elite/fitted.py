"""A trained detector: what it found out about the rows it was trained on, and how it scores others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaql.methods.elite.detectors import SVDD, Autoencoder, Detector, find_detector
from metaql.methods.elite.settings import Settings
from metaql.methods.networks import require_module
from metaql.methods.random_numbers import seeded
from metaql.methods.rows import Shape, checked, in_parts
from metaql.methods.scaling import Scaling
from metaql.methods.taken_apart import load, scaling_from, taken_apart

_RESULTS = ("anomaly_score", "pseudo_label", "meta_gradient", "weight")


@dataclass(frozen=True)
class Epoch:
    """What an epoch came to: the mean validation loss of its batches, and shares of rows.

    ``anomalous`` is the share with the pseudo label "anomaly", ``settled`` of those that skipped the meta-gradient.
    None without labels.
    """

    epoch: int
    validation_loss: float | None
    anomalous: float | None
    settled: float | None


@dataclass(frozen=True)
class Fitted:
    """Results for the training rows in their order, by the final network; and the model, to score other rows.

    ``anomaly_score`` float32 [n], larger is more anomalous. With labels also ``pseudo_label`` bool [n], True for an
    anomaly, by all that the row's meta-gradients said in training; ``meta_gradient`` float32 [n], what training on the
    row as normal would now add to the labelled rows' loss in one step of gradient descent (Eq. 13), negative if it
    helps; ``weight`` float32 [n], with which the row was last trained, negative for a pseudo anomaly. The detectors to
    compare with have no weights, and pseudo labels by the sign of ``meta_gradient``.
    """

    settings: Settings
    shape: Shape
    anomaly_score: Tensor
    pseudo_label: Tensor | None
    meta_gradient: Tensor | None
    weight: Tensor | None
    history: list[Epoch]
    module: nn.Module
    scaling: Scaling

    def score(self, features: Tensor) -> Tensor:
        """float32 [n] for rows [n, *shape], which are scaled as the training rows were."""
        detector = find_detector(self.settings)
        return in_parts(
            lambda rows: detector.score(self.module, self.scaling(rows)), checked(features, self.shape)
        ).float()

    def embedding(self, features: Tensor) -> Tensor:
        """float32 [n, d]: the network's points, or for a registered detector the scaled rows, flattened."""
        own = isinstance(self.module, (SVDD, Autoencoder))
        apply = self.module if own else torch.nn.Identity()
        return in_parts(lambda rows: apply(self.scaling(rows)).flatten(1), checked(features, self.shape)).float()

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors by name, and as values that JSON has."""
        description = {
            "settings": asdict(self.settings),
            "shape": list(self.shape),
            "history": [vars(each) for each in self.history],
        }
        return taken_apart(self.module, self.scaling, {name: getattr(self, name) for name in _RESULTS}), description

    @staticmethod
    def restored(tensors: dict[str, Tensor], description: dict[str, Any]) -> Fitted:
        """What ``saved`` took apart. QueryError if a network or detector must be registered again first."""
        settings = Settings(**description["settings"])
        shape = tuple(description["shape"])
        module = fresh_module(find_detector(settings), shape, settings)
        load(module, tensors, settings.network or settings.detector)
        results = {name: tensors.get(name) for name in _RESULTS}
        scaling = scaling_from(tensors)
        history = [Epoch(**each) for each in description["history"]]
        return Fitted(settings, shape, **results, history=history, module=module.eval(), scaling=scaling)  # type: ignore[arg-type]


def fresh_module(detector: Detector, shape: Shape, settings: Settings) -> nn.Module:
    """The detector's module with its first weights, which the seed decides."""
    with seeded(settings.seed):
        return require_module(detector.build(shape, settings.network), f"detector '{settings.detector}'")
