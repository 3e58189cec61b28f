"""Leaving samples out, at a toy size, and what is compared with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import data, left_out, left_out_cases
from bench.hessian_aware import retrained
from bench.hydra_truth import small, small_network
from bench.left_out_cases import CG, LISSA
from bench.left_out_truth import Optimum
from bench.recorded_training import Training
from bench.report import Report, table


@pytest.fixture(autouse=True)
def _noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    some = torch.rand(40, 1, 28, 28), torch.arange(40) % 10
    monkeypatch.setattr(data, "fashion_mnist", lambda split: some)


def test_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The noise here bends the other way more than the real images do.
    monkeypatch.setattr(left_out_cases, "OUTWEIGHS", 2.0)
    monkeypatch.setattr(left_out_cases, "SOLVERS", {name: left_out_cases.SOLVERS[name] for name in (CG, LISSA)})
    monkeypatch.setattr(left_out, "GROUPS", 3)
    report, points = Report("toy", "Does it run?"), {}
    for case in (
        left_out_cases.trained(tmp_path / "trained", 40, 3, 4),
        left_out_cases.at_optimum(tmp_path / "optimum", 40, 3, 0.5),
    ):
        points |= left_out.measure(report, case)
    left_out.judge(report)
    left_out.remarks(report, 40, 3)
    report.write([table(left_out.of(report, "one"), left_out.ONE)], left_out.plot(points), tmp_path)
    assert (tmp_path / "toy.png").stat().st_size > 0
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    found = {(row["case"], row["method"]): row for row in rows if row["section"] == "one"}
    exact, at_end = found["4 epochs", left_out.EXACT], found["optimum, penalty 0.5", CG]
    assert exact["slope"] == pytest.approx(1, abs=0.05)
    assert exact["pearson"] > 0.99
    assert at_end["slope"] == pytest.approx(1, abs=0.1)
    assert at_end["spearman"] > 0.99
    assert found["optimum, penalty 0.5", LISSA]["each"] is None
    assert len([row for row in rows if row["section"] == "groups"]) == len(found) == 11 + 7


def test_a_wrong_scale_is_found() -> None:
    case = left_out_cases.Case(
        "made up", torch.zeros(9), lambda shares: -shares.sum(1, keepdim=True), {CG: (torch.ones(9, 1), 0.0)}
    )
    left_out_cases.require_derivative(case)
    case.forecasts[CG] = 1.01 * torch.ones(9, 1), 0.0
    with pytest.raises(SystemExit, match="WRONG RESULT: the derivative at the optimum"):
        left_out_cases.require_derivative(case)


def test_all_trainings_at_once_are_those_one_by_one() -> None:
    inputs, labels = small("train", 12)
    training, share = Training(2, batch=5, rate=0.1), torch.ones(2, 12, dtype=torch.float64)
    share[1, 3] = 0
    found = retrained(small_network(), training, inputs, labels, share)
    for weights, own in zip(found, share, strict=True):
        model = small_network()
        optimizer = training.optimizer(model)
        for ids in (each for epoch in training.batches(12) for each in epoch):
            optimizer.zero_grad()
            (F.cross_entropy(model(inputs[ids]), labels[ids], reduction="none") * own[ids]).mean().backward()
            optimizer.step()
        torch.testing.assert_close(weights, torch.cat([each.detach().flatten() for each in model.parameters()]))


def test_the_optimum_is_one() -> None:
    inputs, labels = small("train", 30)
    shares = torch.ones(2, 30, dtype=torch.float64)
    shares[1, :4] = 0

    def slope(weights: Tensor, share: Tensor) -> Tensor:
        weights = weights.detach().requires_grad_()
        losses = F.cross_entropy(inputs @ weights.T, labels, reduction="none")
        ((share * losses).mean() + 0.05 * weights.square().sum()).backward()
        assert weights.grad is not None
        return weights.grad

    for weights, share in zip(Optimum(inputs, labels, 10, 0.1).weights(shares), shares, strict=True):
        torch.testing.assert_close(slope(weights, share), torch.zeros_like(weights), rtol=0, atol=1e-12)


def test_sets() -> None:
    labels = torch.arange(40) % 10
    labels[labels == 9] = 8
    random, of_class = left_out.groups(labels)
    assert random.sum(1).tolist() == [2] * left_out.GROUPS
    assert of_class.sum(1).tolist() == [2] * 9 + [0]
    influence = torch.arange(40.0)
    assert [each.nonzero().flatten().tolist() for each in left_out.extremes(influence)] == [[0, 1], [38, 39]]
    assert left_out.slope(influence, 3 * influence) == pytest.approx(3)
