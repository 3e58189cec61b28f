"""bergson's index of gradients, in full and projected; of linear layers with inputs [samples, positions, width]."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers.case import Case, Samples, batches
from bench.peers.way import Ask, Way

BATCH, PROJECTED = 500, 16


def index(case: Case, folder: Path, projected: int) -> Ask:
    """Gradients, or projections of them, lie on the disk and are read into memory once."""
    from bergson import Attributor

    model = _model(case)
    build(model, case.train, folder, projected)
    attributor = Attributor(folder / "index")

    def ask(number: int) -> Tensor:
        with attributor.trace(model, k=None) as found:
            _backward(model, case.queries[number])
        return torch.empty_like(found.scores).scatter_(1, found.indices, found.scores).T

    return ask


def build(model: Any, samples: Samples, folder: Path, projected: int) -> None:
    """The index of the samples, as its own command builds one from texts."""
    from bergson import GradientCollector, GradientProcessor, IndexConfig
    from datasets import Dataset

    config = IndexConfig(
        run_path=str(folder / "index"), projection_dim=projected, include_bias=True, drop_columns=False
    )
    collector = GradientCollector(
        model=model,
        data=Dataset.from_dict({"input_ids": [[0]] * len(samples[0])}),
        cfg=config,
        processor=GradientProcessor(projection_dim=projected, include_bias=True),
    )
    places = torch.arange(len(samples[0])).split(BATCH)
    for ids, batch in zip(places, batches(samples, BATCH), strict=True):
        with collector.with_batch(None):
            losses = _backward(model, batch)
        collector.process_batch(ids.tolist(), losses=losses)
    collector.teardown()
    config.partial_run_path.rename(folder / "index")


def _model(case: Case) -> Any:
    model = case.model()
    if isinstance(model, nn.Sequential):
        model = nn.Sequential(_Positions(), *model[1:], nn.Flatten())
    model.device = torch.device("cpu")
    return model


class _Positions(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, None]


def _backward(model: nn.Module, samples: Samples) -> Tensor:
    losses = F.cross_entropy(model(samples[0]), samples[1], reduction="none")
    model.zero_grad()
    losses.sum().backward()
    return losses


_IMPORTS = ("bergson", "datasets")

WAYS = [
    Way(
        "bergson, full",
        "bergson",
        partial(index, projected=0),
        _IMPORTS,
        "include_bias, batches of 500, index on disk read into memory",
        recomputes=False,
    ),
    Way(
        "bergson, projected",
        "bergson",
        partial(index, projected=PROJECTED),
        _IMPORTS,
        f"projection_dim={PROJECTED}, include_bias, batches of 500, index on disk read into memory",
        exact=False,
        recomputes=False,
    ),
]
