"""A random mixture of all the samples' losses, which right gradients of the right samples add up to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metaql.storage.recording.aligned import AlignedUse, mixtures
from metaql.storage.recording.batch_run import BatchRun, backward
from metaql.storage.recording.replayed import Gradients
from metaql.storage.recording.self_check import disagreeing


@dataclass(frozen=True)
class Mixture:
    """Σ_k weights_k · loss_k, and its gradients; a parameter that no loss depends on has none.

    Right gradients of wrong samples, or of only some samples, do not add up to these.
    """

    weights: Tensor
    gradients: Mapping[str, Tensor]

    def disagreeing(self, replayed: Gradients, precision: torch.dtype) -> set[str]:
        """The names whose gradients [n, *shape], computed once more, add up to something else."""
        got = {name: torch.tensordot(self.weights.to(each), each, 1)[None].cpu() for name, each in replayed.items()}
        return self._differing(got, precision, slack=30)

    def disagreeing_uses(self, uses: Sequence[AlignedUse], names: set[str], precision: torch.dtype) -> set[str]:
        """The names whose captured uses add up to something else."""
        return self._differing(mixtures(uses, names, self.weights), precision, slack=1)

    def _differing(self, got: Mapping[str, Tensor], precision: torch.dtype, slack: float) -> set[str]:
        # What is not finite here is found, with the sample's id, in the blocks.
        expected = {name: each[None].cpu() for name, each in self.gradients.items() if bool(each.isfinite().all())}
        known = {name: each for name, each in got.items() if name in expected}
        return disagreeing(known, expected, precision, slack=slack)


def mixture_of(run: BatchRun) -> Mixture:
    """That of a batch, differentiated by plain autograd; without gradients where operations ran out of sight."""
    weights = random_weights(run.samples)
    if run.hidden:
        return Mixture(weights, {})
    loss = (run.values * weights.to(run.values)).sum()
    gradients = zip(run.parameters, backward(loss, list(run.parameters.values())), strict=True)
    return Mixture(weights, {name: each.to_dense() for name, each in gradients if each is not None})


def random_weights(samples: int) -> Tensor:
    """One factor for each sample's loss, the same in each run."""
    return torch.randn(samples, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
