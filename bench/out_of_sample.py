"""What networks that were not trained on a sample think of it, and what cleanlab makes of that."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.peers.environments import python
from bench.peers.run import ROOT, environment
from bench.recorded_training import Training

FOLDS = 5


def probabilities(model: nn.Module, inputs: Tensor) -> Tensor:
    """Predicted probabilities [n, classes]."""
    with torch.no_grad():
        return torch.cat([model(part).softmax(1) for part in inputs.split(1000)])


def cross_validated(network: Callable[[], nn.Module], inputs: Tensor, labels: Tensor, training: Training) -> Tensor:
    """Probabilities [n, classes], a sample's by a network that was trained on the other four fifths."""
    folds = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % FOLDS
    parts = []
    for fold in range(FOLDS):
        trained_on, model = folds != fold, network()
        training.run(model, inputs[trained_on], labels[trained_on])
        parts.append(probabilities(model, inputs[~trained_on]))
    # The folds one after another; a stable sort says which place each came from.
    return torch.cat(parts)[folds.argsort(stable=True).argsort()]


def cleanlab(labels: Tensor, predicted: Tensor, environments: Path) -> tuple[Tensor, Tensor]:
    """How doubtful cleanlab finds each label, float64 [n], and whether it names it as an issue, bool [n].

    Raises CalledProcessError where cleanlab cannot be installed or fails.
    """
    interpreter = python(environments, "cleanlab")
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder) / "given.npz", Path(folder) / "found.npz"
        np.savez(given, labels=labels.numpy(), probabilities=predicted.double().numpy())
        command = [str(interpreter), "-m", "bench.peers.cleanlab", str(given), str(found)]
        subprocess.run(command, cwd=ROOT, env=environment(), check=True)
        with np.load(found) as answered:
            return 1 - torch.from_numpy(answered["quality"]).double(), torch.from_numpy(answered["issue"])
