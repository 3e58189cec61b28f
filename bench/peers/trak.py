"""TRAK with one checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers.case import Case, Samples, batches
from bench.peers.way import Ask, Way

BATCH, PROJECTED = 100, 512
# With no more samples than numbers TRAK's matrix has no inverse.
FEW_PROJECTED = 128
LAST, ALL = "TRAK, last checkpoint", "TRAK, all checkpoints"


def trak(case: Case, folder: Path) -> Ask:
    """Projected features of the training samples lie on the disk."""
    scorer = featurized(case.model(), [case.state], case.train, folder, PROJECTED)
    return lambda number: scores(scorer, [case.state], case.queries[number], f"query{number}")


def of_checkpoints(
    model: nn.Module, states: list[dict[str, Tensor]], train: Samples, query: Samples, folder: Path
) -> dict[str, Tensor]:
    """Of the last checkpoint and of all: scores [training samples, query samples]."""
    found = {}
    for name, some in {LAST: states[-1:], ALL: states}.items():
        scorer = featurized(model, some, train, folder / name, FEW_PROJECTED)
        found[name] = scores(scorer, some, query, "query")
    return found


def featurized(model: nn.Module, states: list[dict[str, Tensor]], train: Samples, folder: Path, projected: int) -> Any:
    """A scorer with the training samples' features at each of these weights."""
    from trak import TRAKer

    scorer = TRAKer(
        model,
        "image_classification",
        train_set_size=len(train[0]),
        save_dir=str(folder),
        device="cpu",
        use_half_precision=False,
        proj_dim=projected,
        logging_level=logging.ERROR,
    )
    for number, state in enumerate(states):
        scorer.load_checkpoint(state, model_id=number)
        for batch in batches(train, BATCH):
            scorer.featurize(batch=batch, num_samples=len(batch[0]))
    scorer.finalize_features()
    return scorer


def scores(scorer: Any, states: list[dict[str, Tensor]], query: Samples, name: str) -> Tensor:
    """[training samples, query samples], float32; the mean over the weights."""
    for number, state in enumerate(states):
        scorer.start_scoring_checkpoint(name, state, model_id=number, num_targets=len(query[0]))
        for batch in batches(query, BATCH):
            scorer.score(batch=batch, num_samples=len(batch[0]))
    return torch.as_tensor(scorer.finalize_scores(exp_name=name)).float()


WAYS = [
    Way(
        "TRAK",
        "traker",
        trak,
        ("trak",),
        f"device='cpu', float32, projected to {PROJECTED} numbers, batches of {BATCH}",
        exact=False,
        recomputes=False,
    ),
]
