"""TRAK with one checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from bench.peers.case import Case, batches
from bench.peers.way import Ask, Way

BATCH, PROJECTED = 100, 512


def trak(case: Case, folder: Path) -> Ask:
    """Projected features of the training samples lie on the disk."""
    from trak import TRAKer

    rows = len(case.train[0])
    scorer = TRAKer(
        case.model(),
        "image_classification",
        train_set_size=rows,
        save_dir=str(folder),
        device="cpu",
        use_half_precision=False,
        proj_dim=PROJECTED,
        logging_level=logging.ERROR,
    )
    scorer.load_checkpoint(case.state, model_id=0)
    for batch in batches(case.train, BATCH):
        scorer.featurize(batch=batch, num_samples=len(batch[0]))
    scorer.finalize_features()

    def ask(number: int) -> Tensor:
        query, name = case.queries[number], f"query{number}"
        scorer.start_scoring_checkpoint(name, case.state, model_id=0, num_targets=len(query[0]))
        for batch in batches(query, BATCH):
            scorer.score(batch=batch, num_samples=len(batch[0]))
        return torch.as_tensor(scorer.finalize_scores(exp_name=name)).float()

    return ask


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
