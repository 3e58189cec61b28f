"""kronfluence's pairwise scores, with the identity in place of the Hessian and with EK-FAC."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bench.peers.case import Case, Samples
from bench.peers.way import Ask, Way

BATCH = 500
OWN_DAMPING, SAME_DAMPING = "kronfluence EK-FAC, its damping", "kronfluence EK-FAC, the same damping"


def _task() -> Any:
    from kronfluence.task import Task

    class Classification(Task):
        """Losses have to be sums."""

        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            inputs, labels = batch
            logits = model(inputs)
            if sample:
                labels = torch.multinomial(logits.detach().softmax(1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    return Classification()


def pairwise(case: Case, folder: Path, strategy: str) -> Ask:
    """Factors are fitted once and lie on the disk; training gradients are computed anew for each query.

    Of the empirical Fisher matrix, which depends on no random labels, and with the same damping as MetaQL.
    """
    analyzer = fitted(case.model(), case.train, folder, strategy, empirical=True)
    return lambda number: scores(analyzer, f"query{number}", strategy, case.queries[number], case.train, damping=None)


def of_dampings(model: nn.Module, train: Samples, query: Samples, folder: Path) -> dict[str, Tensor]:
    """EK-FAC of the true Fisher matrix with its own damping and with MetaQL's: [training samples, query samples]."""
    from kronfluence.arguments import ScoreArguments

    analyzer = fitted(model, train, folder, "ekfac", empirical=False)
    dampings = {OWN_DAMPING: ScoreArguments().damping_factor, SAME_DAMPING: None}
    return {name: scores(analyzer, name, "ekfac", query, train, damping) for name, damping in dampings.items()}


def fitted(model: nn.Module, train: Samples, folder: Path, strategy: str, empirical: bool) -> Any:
    """An analyzer with the factors, which are named like their strategy; the model gets layers of its own."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments

    task = _task()
    model = prepare_model(model, task)
    analyzer = Analyzer("scores", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder), log_level=40)
    arguments = FactorArguments(strategy=strategy, use_empirical_fisher=empirical)
    analyzer.fit_all_factors(strategy, TensorDataset(*train), per_device_batch_size=BATCH, factor_args=arguments)
    return analyzer


def scores(analyzer: Any, name: str, factors: str, query: Samples, train: Samples, damping: float | None) -> Tensor:
    """[training samples, query samples]; without a damping a tenth of the mean eigenvalue."""
    from kronfluence.arguments import ScoreArguments

    analyzer.compute_pairwise_scores(
        name,
        factors,
        TensorDataset(*query),
        TensorDataset(*train),
        len(query[0]),
        per_device_train_batch_size=BATCH,
        score_args=ScoreArguments(damping_factor=damping),
    )
    found: Tensor = analyzer.load_pairwise_scores(name)["all_modules"]
    return found.T.contiguous()


_IMPORTS = ("kronfluence.analyzer",)

WAYS = [
    Way(
        "kronfluence, identity",
        "kronfluence",
        partial(pairwise, strategy="identity"),
        _IMPORTS,
        "cpu, batches of 500, all query samples in one",
    ),
    Way(
        "kronfluence, EK-FAC",
        "kronfluence",
        partial(pairwise, strategy="ekfac"),
        _IMPORTS,
        "cpu, batches of 500, all query samples in one, factors in the default precision, empirical Fisher matrix, "
        "damping of a tenth of the mean eigenvalue",
        exact=False,
    ),
]
