"""captum's TracInCP and TracInCPFast with one checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from bench.peers.case import Case, last_layer
from bench.peers.way import LAST_WEIGHT, Ask, Way

BATCH = 100


def _arguments(case: Case, folder: Path) -> dict[str, Any]:
    torch.save(case.state, folder / "checkpoint.pt")
    return {
        "train_dataset": TensorDataset(*case.train),
        "checkpoints": [str(folder / "checkpoint.pt")],
        "loss_fn": nn.CrossEntropyLoss(reduction="sum"),
        "batch_size": BATCH,
    }


def tracin(case: Case, folder: Path) -> Ask:
    """Over all layers; its trick for per-sample gradients is for linear and convolution layers only."""
    from captum.influence import TracInCP

    scorer = TracInCP(case.model(), sample_wise_grads_per_batch=True, **_arguments(case, folder))
    return lambda number: scorer.influence(case.queries[number]).T


def fast(case: Case, folder: Path) -> Ask:
    """Over the last layer's weight; it leaves out the bias."""
    from captum.influence import TracInCPFast

    model = case.model()
    scorer = TracInCPFast(model, final_fc_layer=last_layer(model), **_arguments(case, folder))
    return lambda number: scorer.influence(case.queries[number]).T


WAYS = [
    Way("captum TracInCP", "captum", tracin, ("captum.influence",), f"sample_wise_grads_per_batch, batches of {BATCH}"),
    Way("captum TracInCPFast", "captum", fast, ("captum.influence",), f"batches of {BATCH}", LAST_WEIGHT),
]
