"""The benchmark of HYDRA at a toy size, and what it compares with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from bench import data, hydra, hydra_cost, hydra_truth
from bench.hessian_aware import Differentiable
from bench.rankings import auc, precision, spearman
from bench.recorded_training import Training
from bench.report import Report, table
from metaql.methods.hessian import Hessian


@pytest.fixture(autouse=True)
def _noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    some = torch.rand(60, 1, 28, 28), torch.arange(60) % 10
    monkeypatch.setattr(data, "fashion_mnist", lambda split: some)


def test_rankings() -> None:
    one, other = torch.randint(0, 5, (2, 30)), torch.randn(2, 30)
    expected = [spearmanr(a, b).statistic for a, b in zip(one, other, strict=True)]
    torch.testing.assert_close(spearman(one, other), torch.tensor(expected, dtype=torch.float64))
    marked = torch.rand(30) < 0.3
    assert auc(one[0], marked) == pytest.approx(roc_auc_score(marked, one[0]))
    assert precision(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, True, False, False])) == 0.5
    assert precision(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([True, True, False, False]), 1) == 1


def test_products_with_the_hessian() -> None:
    inputs, labels = hydra_truth.small("train", 8)
    losses = Differentiable(hydra_truth.small_network())
    weights = losses.weights()
    hessian = Hessian(lambda values, batch: losses.losses(values["all"], *batch), {"all": weights}, [(inputs, labels)])
    vectors = torch.randn(3, len(weights), dtype=torch.float64)
    expected = torch.stack([hessian.times(each) for each in vectors])
    torch.testing.assert_close(losses.hessian_times(weights, inputs, labels, vectors), expected)


def test_every_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hydra_cost, "WAYS", {name: hydra_cost.WAYS[name] for name in ("all, float32", "one update in 2")}
    )
    monkeypatch.setattr(hydra_cost, "fresh", hydra_cost.one_process)
    report = Report("toy", "Does it run?")
    sizes = hydra.Sizes(20, 20, Training(4, batch=10), 1)
    hydra.cost(report, tmp_path, sizes)
    hydra.classes(report, tmp_path / hydra.FULL_RECORDING, sizes)
    hydra.truth(report, tmp_path, 12, 3, [1])
    hydra.grow(report, sizes, [1, 2])
    hydra.judge(report)
    hydra.remarks(report)
    report.write([table(hydra.of(report, "cost"), hydra.COST)], hydra.plot(report), tmp_path)
    assert (tmp_path / "toy.png").stat().st_size > 0
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    cost = {row["recorded"]: row for row in rows if row["section"] == "cost"}
    assert cost["all, float32"]["spearman"] == pytest.approx(1)
    assert cost["one update in 2"]["bytes"] < 0.8 * cost["all, float32"]["bytes"]
    assert [row["rows"] for row in rows if row["section"] == "growth"] == [20, 40]


def test_wrong_influence_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hydra_truth.derivatives
    monkeypatch.setattr(hydra_truth, "derivatives", lambda *given, **settings: 1.001 * right(*given, **settings))
    with pytest.raises(SystemExit, match=r"WRONG RESULT: hydra\(\) is not Algorithm 1"):
        hydra.truth(Report("toy", "Does it run?"), tmp_path, 12, 3, [1])


def test_a_wrong_hessian_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Differentiable.hessian_times
    monkeypatch.setattr(Differentiable, "hessian_times", lambda *given: 0.9 * right(*given))
    with pytest.raises(SystemExit, match="WRONG RESULT: the exact recurrence is off"):
        hydra.truth(Report("toy", "Does it run?"), tmp_path, 12, 3, [2])
