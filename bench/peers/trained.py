"""What other libraries make of trainings that were recorded: their scores, each library in a process of its own.

python -m bench.peers.trained PACKAGE TRAININGS SCORES
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.peers import dattri, kronfluence, trak
from bench.peers.case import Samples


@dataclass(frozen=True)
class Trained:
    """A network's weights and learning rates at checkpoints, in order; what it was trained on and is asked about."""

    model: nn.Module
    states: list[dict[str, Tensor]]
    rates: list[float]
    train: Samples
    query: Samples


# Method => scores [training samples, query samples]; positive helps. They may write into the folder.
METHODS: dict[str, Callable[[Trained, Path], dict[str, Tensor]]] = {
    "kronfluence": lambda one, folder: kronfluence.of_dampings(one.model, one.train, one.query, folder),
    "dattri": lambda one, folder: dattri.tracin(one.model, one.states, one.rates, one.train, one.query),
    "traker": lambda one, folder: trak.of_checkpoints(one.model, one.states, one.train, one.query, folder),
}


def main() -> None:
    """Leaves a list of the scores by method, one of each training."""
    package, trainings, scores = sys.argv[1:]
    torch.set_num_threads(1)
    found = []
    for number, one in enumerate(torch.load(trainings, weights_only=False)):
        torch.manual_seed(number)
        with tempfile.TemporaryDirectory() as folder:
            # Some leave files in the working directory and read them in the next run.
            os.chdir(folder)
            found.append(METHODS[package](one, Path(folder)))
            os.chdir(Path(scores).parent)
    torch.save(found, scores)


if __name__ == "__main__":
    main()
