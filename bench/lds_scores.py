"""Forecasts of ``bench.lds``: each method's influence of training samples on test losses, and how well it foretells."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import metaql
from bench.peers.environments import python
from bench.peers.run import run
from bench.peers.trained import Trained
from bench.rankings import ranks, spearman
from bench.report import require

EKFAC, PLAIN, TRACIN = "EK-FAC, last checkpoint", "inner product, last checkpoint", "TracIn, all checkpoints"
PRECONDITIONED = """
SELECT t.sample_id, v.sample_id, inner_product(t.gradient, precondition(v.gradient, '{}'))
FROM train t, validation v"""
# (training sample, test sample, influence); positive helps.
METHODS = {
    PLAIN: "SELECT * FROM p2p()",
    "cosine similarity, last checkpoint": """
SELECT t.sample_id, v.sample_id, cosine_similarity(t.gradient, v.gradient) FROM train t, validation v""",
    TRACIN: """
SELECT t.sample_id, v.sample_id, sum(c.learning_rate * inner_product(t.gradient, v.gradient))
FROM gradients t JOIN gradients v USING (checkpoint) JOIN checkpoints c USING (checkpoint)
WHERE t.split = 'train' AND v.split = 'validation' GROUP BY ALL""",
    "HYDRA": """
SELECT g.sample_id, v.sample_id, sum(w.weight * inner_product(g.gradient, v.gradient))
FROM gradients g JOIN hydra_weights w USING (step), validation v WHERE g.split = 'train' GROUP BY ALL""",
    "diagonal Fisher, last checkpoint": PRECONDITIONED.format("diagonal"),
    "K-FAC, last checkpoint": PRECONDITIONED.format("kfac"),
    EKFAC: PRECONDITIONED.format("ekfac"),
}


@dataclass(frozen=True)
class Score:
    """The mean rank correlation over test samples, and what it would be ``without`` each of the halves."""

    value: float
    without: Tensor

    @property
    def error(self) -> float:
        """The jackknife's standard error, of other halves."""
        count = len(self.without)
        return float(((self.without - self.without.mean()).square().sum() * (count - 1) / count).sqrt())


def influences(db: metaql.Connection, text: str, samples: int, tests: int) -> Tensor:
    """A query's answer, float64 [samples, tests]."""
    columns = db.sql(text).fetchnumpy()
    sample, test, score = (torch.from_numpy(each) for each in columns.values())
    require(len(score) == samples * tests, f"{len(score)} pairs are not all: {text}")
    found = torch.zeros(samples, tests, dtype=torch.float64)
    found[sample, test] = score.double()
    return found


def of_store(store: Path, one: Trained) -> dict[str, tuple[Tensor, float]]:
    """Every method's influences, asked of a recorded training, and the seconds that took."""
    found = {}
    with metaql.connect(store) as db:
        for method, text in METHODS.items():
            begin = time.perf_counter()
            influence = influences(db, text, len(one.train[0]), len(one.query[0]))
            found[method] = influence, time.perf_counter() - begin
    return found


def of_peer(package: str, trainings: list[Trained], environments: Path, limit: float) -> list[dict[str, Tensor]]:
    """What another library makes of each training, by method; WayError with the reason where it does not."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answered = Path(folder) / "trainings.pt", Path(folder) / "scores.pt"
        torch.save(trainings, asked)
        arguments = ["bench.peers.trained", package, str(asked), str(answered)]
        run(lambda: python(environments, package), arguments, Path(folder), limit)
        found: list[dict[str, Tensor]] = torch.load(answered, weights_only=True)
    return found


def forecast(chosen: Tensor, influence: Tensor, losses: Tensor) -> Score:
    """Of losses [halves, tests] by influence [samples, tests], added up over each half."""
    return correlation(chosen.double() @ influence.double(), -losses)


def correlation(one: Tensor, other: Tensor) -> Score:
    """Over the halves, [halves, tests] both."""
    rows = [_without_each(each.T) for each in (one, other)]
    without = (rows[0] * rows[1]).sum(-1) / (rows[0].norm(dim=-1) * rows[1].norm(dim=-1))
    return Score(float(spearman(one.T, other.T).mean()), without.mean(0))


def _without_each(values: Tensor) -> Tensor:
    """Ranks among the others when one is left out, less their mean, [..., left out, values]; its own is 0."""
    count = values.shape[-1]
    left, kept = values.unsqueeze(-1), values.unsqueeze(-2)
    found = ranks(values).unsqueeze(-2) - (left < kept).double() - (left == kept) / 2 - (count - 2) / 2
    return found.masked_fill(torch.eye(count, dtype=torch.bool), 0)


def mean(scores: list[Score]) -> Score:
    """The score that is the mean of several."""
    return Score(sum(one.value for one in scores) / len(scores), torch.stack([one.without for one in scores]).mean(0))
