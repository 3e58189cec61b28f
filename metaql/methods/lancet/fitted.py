"""What a round found out about its rows, and the model, which embeds and labels others."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.lancet.networks import build_network
from metaql.methods.lancet.objectives import Embedded
from metaql.methods.lancet.settings import Settings
from metaql.methods.lancet.stopping import Stop
from metaql.methods.random_numbers import seeded
from metaql.methods.rows import Shape, checked, in_parts
from metaql.methods.scaling import Scaling
from metaql.methods.taken_apart import load, scaling_from, taken_apart

_RESULTS = ("label", "probability", "weight", "ask", "classes")


@dataclass(frozen=True)
class Epoch:
    """The mean loss of an epoch's batches."""

    epoch: int
    loss: float


@dataclass(frozen=True)
class Fitted:
    """Results for a round's rows in their order.

    ``label`` int64 [n]: the given one, or what the linear model says; -1 as long as there are no labels at all.
    ``probability`` float32 [n]: the linear model's, of that label, NaN where there is none. ``weight`` float32 [n]: how
    many labelled rows there are near, 1 on average, small for a row that no labelled row speaks for; NaN for labelled
    rows and without labels. ``ask`` int64: places of the rows to ask a person next, the most telling first, also
    when ``stop`` says that it is enough. ``classes`` int64: those that have a label, in order.
    """

    settings: Settings
    shape: Shape
    label: Tensor
    probability: Tensor
    weight: Tensor
    ask: Tensor
    classes: Tensor
    stop: Stop
    history: list[Epoch]
    module: Embedded
    scaling: Scaling

    def embedding(self, features: Tensor) -> Tensor:
        """float32 [n, d] for rows [n, *shape], which are scaled as the round's rows were."""
        return in_parts(lambda rows: self.module.network(self.scaling(rows)), checked(features, self.shape))

    def predict(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """label int64 [n] and its probability float32 [n]; QueryError if the round had no labels."""
        if len(self.classes) == 0:
            raise QueryError("the model was made without labels and can't give any: label the rows it asks for first")
        chances = chances_of(self.module, self.scaling(checked(features, self.shape)))
        probability, place = chances.max(1)
        return self.classes[place], probability

    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it as tensors by name, and as values that JSON has."""
        description = {
            "settings": asdict(self.settings),
            "shape": list(self.shape),
            "stop": vars(self.stop),
            "history": [vars(each) for each in self.history],
        }
        return taken_apart(self.module, self.scaling, {name: getattr(self, name) for name in _RESULTS}), description

    @staticmethod
    def restored(tensors: dict[str, Tensor], description: dict[str, Any]) -> Fitted:
        """What ``saved`` took apart. QueryError if a network must be registered again first."""
        settings = Settings(**description["settings"])
        shape = tuple(description["shape"])
        module = fresh_module(settings, shape, len(tensors["classes"]))
        load(module, tensors, f"network {settings.network}")
        return Fitted(
            settings,
            shape,
            **{name: tensors[name] for name in _RESULTS},
            stop=Stop(**description["stop"]),
            history=[Epoch(**each) for each in description["history"]],
            module=module.eval(),
            scaling=scaling_from(tensors),
        )


def fresh_module(settings: Settings, shape: Shape, classes: int) -> Embedded:
    """An embedding with its first weights, which the seed decides, and a linear model of ``classes``, 1 at least."""
    with seeded(settings.seed):
        ready = settings.embedding == "ready"
        network, points = (nn.Flatten(), torch.Size(shape).numel()) if ready else build_network(settings.network, shape)
        return Embedded(network, points, max(1, classes))


def chances_of(module: Embedded, rows: Tensor) -> Tensor:
    """float32 [n, classes]: the linear model's probabilities for scaled rows."""
    module.eval()
    return in_parts(lambda part: module(part)[1].softmax(1), rows)
