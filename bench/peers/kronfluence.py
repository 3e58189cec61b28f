"""kronfluence's pairwise scores, with the identity in place of the Hessian and with EK-FAC."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from bench.peers.case import Case
from bench.peers.way import Ask, Way

BATCH = 500


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
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments

    task = _task()
    model = prepare_model(case.model(), task)
    train = TensorDataset(*case.train)
    analyzer = Analyzer("scores", model, task, cpu=True, disable_tqdm=True, output_dir=str(folder), log_level=40)
    arguments = FactorArguments(strategy=strategy, use_empirical_fisher=True)
    analyzer.fit_all_factors(strategy, train, per_device_batch_size=BATCH, factor_args=arguments)

    def ask(number: int) -> Tensor:
        query = TensorDataset(*case.queries[number])
        name = f"query{number}"
        analyzer.compute_pairwise_scores(
            name,
            strategy,
            query,
            train,
            len(query),
            per_device_train_batch_size=BATCH,
            score_args=ScoreArguments(damping_factor=None),
        )
        return analyzer.load_pairwise_scores(name)["all_modules"].T

    return ask


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
