"""The linear datamodelling score, at a toy size and by hand."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from bench import lds, lds_scores
from bench.lds_tasks import Task, halves, record, retrained
from bench.peers import trained
from bench.peers.dattri import TRACIN as DATTRI_TRACIN
from bench.peers.kronfluence import OWN_DAMPING, SAME_DAMPING
from bench.peers.run import WayError, run
from bench.peers.trained import Trained
from bench.recorded_training import Training
from bench.report import Report

SOME = torch.rand(40, 1, 3, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 5


def network(seed: int) -> nn.Module:
    """Two small layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.ReLU(), nn.Linear(4, 5))


TASK = Task("toy", lambda split: SOME, network, Training(4, batch=8, rate=0.1), 16, 5, halves=6, times=2, asked=2)
PEERS = {"kronfluence": (Path(), 1.0), "dattri": (Path(), 1.0), "traker": (Path(), 1.0)}


def of_peer(package: str, trainings: list[Trained], environments: Path, limit: float) -> list[dict[str, torch.Tensor]]:
    """Two libraries' scores, and a failure."""
    if package == "traker":
        raise WayError("it broke")
    generator = torch.Generator().manual_seed(1)
    names = [DATTRI_TRACIN] if package == "dattri" else [OWN_DAMPING, SAME_DAMPING]
    return [{name: torch.randn(16, 5, generator=generator) for name in names} for _ in trainings]


def test_all_methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lds, "of_peer", of_peer)
    report = Report("toy", "Does it run?")
    lds.measure(report, TASK, tmp_path, PEERS)
    lds.judge(report, list(PEERS))
    report.write(lds.page(report), lds.plot(report), tmp_path)
    assert (tmp_path / "toy.png").stat().st_size > 0
    assert "- traker failed on toy: `it broke`" in (tmp_path / "toy.md").read_text()
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    others = [OWN_DAMPING, SAME_DAMPING, DATTRI_TRACIN, "traker"]
    assert [row["method"] for row in rows] == [*lds.METHODS, *others, lds.RANDOM, lds.LIMIT]
    for row in rows:
        if "scores" in row:
            assert len(row["scores"]) == 2
            assert row["score"] == pytest.approx(sum(row["scores"]) / 2)
            assert all(-1 <= each <= 1 for each in row["scores"])


def test_a_true_forecast_and_its_opposite() -> None:
    chosen = halves(replace(TASK, halves=20))
    assert chosen.sum(1).tolist() == [8] * 20
    influence = torch.randn(16, 5, dtype=torch.float64)
    losses = 3 - torch.stack([influence[each].sum(0) for each in chosen])
    for sign in (1, -1):
        found = lds_scores.forecast(chosen, sign * influence, losses)
        assert (found.value, found.error) == (pytest.approx(sign), pytest.approx(0))


def test_score_and_error() -> None:
    one, other = torch.randn(2, 12, 3, dtype=torch.float64)
    # Equal ones share a place.
    one[3] = one[5]

    def mean(kept: list[int]) -> float:
        each = [spearmanr(one[kept, test], other[kept, test]).statistic for test in range(3)]
        return sum(each) / 3

    found = lds_scores.correlation(one, other)
    without = [mean([place for place in range(12) if place != left]) for left in range(12)]
    assert found.value == pytest.approx(mean(list(range(12))))
    assert found.without.tolist() == pytest.approx(without)
    centre = sum(without) / 12
    assert found.error == pytest.approx((11 / 12 * sum((each - centre) ** 2 for each in without)) ** 0.5)
    both = lds_scores.mean([found, lds_scores.correlation(one, -other)])
    assert (both.value, both.error) == (pytest.approx(0), pytest.approx(0))


def test_a_forecast_from_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lds, "forecast", lambda *given: lds_scores.Score(0.5, torch.zeros(6)))
    with pytest.raises(SystemExit, match="WRONG RESULT: random influence foretells retraining"):
        lds.measure(Report("toy", "Does it run?"), TASK, tmp_path, {})


def test_what_others_get_is_what_was_recorded(tmp_path: Path) -> None:
    one, reached = record(tmp_path / "store", TASK, 1)
    assert 0 <= reached <= 1
    assert (len(one.states), one.rates) == (4, [0.1] * 4)
    assert all(torch.equal(each, one.model.state_dict()[name]) for name, each in one.states[-1].items())
    assert not torch.equal(one.states[0]["1.weight"], one.states[3]["1.weight"])
    found = lds_scores.of_store(tmp_path / "store", one)
    by_hand = torch.zeros(16, 5)
    for state, rate in zip(one.states, one.rates, strict=True):
        one.model.load_state_dict(state)
        parts = one.train, one.query
        gradients = [torch.stack([gradient(one, x, y) for x, y in zip(*part, strict=True)]) for part in parts]
        by_hand += rate * gradients[0] @ gradients[1].T
    torch.testing.assert_close(found[lds_scores.TRACIN][0].float(), by_hand, rtol=1e-4, atol=1e-5)


def gradient(one: Trained, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Of one sample's loss, flat."""
    loss = torch.nn.functional.cross_entropy(one.model(image[None]), label[None])
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(one.model.parameters()))])


def test_no_training_is_run_twice() -> None:
    losses = retrained(halves(TASK), TASK)
    assert losses.shape == (2, 6, 5)
    assert len(losses.flatten(0, 1).unique(dim=0)) == 12


def test_promises_beside_other_libraries() -> None:
    def missed(own: list[float], other: list[float]) -> bool:
        report = Report("toy", "Does it run?")
        lds._no_worse(report, "toy", *({"score": sum(each) / 3, "scores": each} for each in (own, other)), SAME_DAMPING)
        return not report.promises[0].kept

    assert not missed([0.5, 0.6, 0.7], [0.4, 0.5, 0.6])
    # Behind by chance, behind each time, and behind by much.
    assert not missed([0.50, 0.51, 0.50], [0.51, 0.50, 0.51])
    assert missed([0.500, 0.510, 0.505], [0.510, 0.521, 0.514])
    assert missed([0.5, 0.5, 0.5], [0.7, 0.4, 0.6])
    assert lds.interval([1.0, 2.0, 3.0]) == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    report = Report("toy", "Does it run?")
    lds._no_worse(report, "toy", {}, None, SAME_DAMPING)
    assert [(one.kept, one.measured) for one in report.promises] == [(False, "kronfluence gave no scores")]


def test_a_library_scores_each_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Trained(network(0).eval(), [], [], SOME, SOME)
    torch.save([one, one], tmp_path / "trainings.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", "dattri", str(tmp_path / "trainings.pt"), str(tmp_path / "scores.pt")])
    monkeypatch.setitem(trained.METHODS, "dattri", lambda given, folder: {"loss": given.model(given.query[0])})
    trained.main()
    found = torch.load(tmp_path / "scores.pt", weights_only=True)
    assert [list(each) for each in found] == [["loss"]] * 2
    assert torch.equal(found[0]["loss"], one.model(SOME[0]))


def test_a_module_that_fails(tmp_path: Path) -> None:
    with pytest.raises(WayError, match=r"missing\.json"):
        run(lambda: Path(sys.executable), ["json.tool", "missing.json"], tmp_path, 60)
