"""A trained detector: what it found out about the rows it was trained on, and how it scores others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.elite.checks import require_module
from metaql.methods.elite.detectors import SVDD, Autoencoder, Detector, find_detector
from metaql.methods.elite.settings import Settings
from metaql.methods.random_numbers import seeded
from metaql.methods.rows import Shape, in_parts
from metaql.methods.scaling import Scaling

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
        return in_parts(lambda rows: detector.score(self.module, self.scaling(rows)), self._checked(features)).float()

    def embedding(self, features: Tensor) -> Tensor:
        """float32 [n, d]: the network's points, or for a registered detector the scaled rows, flattened."""
        own = isinstance(self.module, (SVDD, Autoencoder))
        apply = self.module if own else torch.nn.Identity()
        return in_parts(lambda rows: apply(self.scaling(rows)).flatten(1), self._checked(features)).float()

    def _checked(self, features: Tensor) -> Tensor:
        if tuple(features.shape[1:]) != self.shape:
            raise QueryError(
                f"the model was trained on rows of shape {list(self.shape)}, and these have {list(features.shape[1:])}"
            )
        return features

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors by name, and as values that JSON has."""
        tensors = {f"module.{name}": value for name, value in self.module.state_dict().items()}
        tensors |= {"scaling.centre": self.scaling.centre, "scaling.deviation": self.scaling.deviation}
        tensors |= {name: getattr(self, name) for name in _RESULTS if getattr(self, name) is not None}
        description = {
            "settings": self.settings.described(),
            "shape": list(self.shape),
            "history": [vars(each) for each in self.history],
        }
        return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, description

    @staticmethod
    def restored(tensors: dict[str, Tensor], description: dict[str, Any]) -> Fitted:
        """What ``saved`` took apart. QueryError if a network or detector must be registered again first."""
        settings = Settings(**description["settings"])
        shape = tuple(description["shape"])
        module = fresh_module(find_detector(settings), shape, settings)
        state = {name.removeprefix("module."): each for name, each in tensors.items() if name.startswith("module.")}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise QueryError(
                f"the saved model does not fit the {settings.network or settings.detector} that is registered now: "
                f"register the one it was trained with ({str(error).splitlines()[-1].strip()})"
            ) from error
        results = {name: tensors.get(name) for name in _RESULTS}
        scaling = Scaling(tensors["scaling.centre"], tensors["scaling.deviation"])
        history = [Epoch(**each) for each in description["history"]]
        return Fitted(settings, shape, **results, history=history, module=module.eval(), scaling=scaling)  # type: ignore[arg-type]


def fresh_module(detector: Detector, shape: Shape, settings: Settings) -> nn.Module:
    """The detector's module with its first weights, which the seed decides."""
    with seeded(settings.seed):
        return require_module(detector.build(shape, settings.network), f"detector '{settings.detector}'")
