"""The linear datamodelling score, at a toy size and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from bench import data, lds
from bench.recorded_training import Training
from bench.report import Report, table


@pytest.fixture(autouse=True)
def _noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    some = torch.rand(40, 1, 28, 28), torch.arange(40) % 10
    monkeypatch.setattr(data, "fashion_mnist", lambda split: some)


def sizes(halves: int = 6) -> lds.Sizes:
    return lds.Sizes(16, 5, halves, 2, Training(4, batch=8, rate=0.1))


def test_all_methods(tmp_path: Path) -> None:
    report = Report("toy", "Does it run?")
    lds.measure(report, sizes(), tmp_path)
    lds.judge(report)
    report.write([table(report.rows, lds.COLUMNS)], lds.plot(report), tmp_path)
    assert (tmp_path / "toy.png").stat().st_size > 0
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    assert [row["method"] for row in rows] == [*lds.METHODS, lds.RANDOM, lds.LIMIT]
    assert all(-1 <= row["score"] <= 1 for row in rows)


def test_a_true_forecast_and_its_opposite() -> None:
    chosen = lds.halves(sizes(halves=20))
    assert chosen.sum(1).tolist() == [8] * 20
    influence = torch.randn(16, 5, dtype=torch.float64)
    losses = 3 - torch.stack([influence[each].sum(0) for each in chosen])
    assert lds.forecast(chosen, influence, losses) == (pytest.approx(1), pytest.approx(0))
    assert lds.forecast(chosen, -influence, losses) == (pytest.approx(-1), pytest.approx(0))


def test_score_and_error() -> None:
    one, other = torch.randn(2, 12, 3, dtype=torch.float64)

    def mean(kept: list[int]) -> float:
        each = [spearmanr(one[kept, test], other[kept, test]).statistic for test in range(3)]
        return sum(each) / 3

    without = [mean([place for place in range(12) if place != left]) for left in range(12)]
    centre = sum(without) / 12
    error = (11 / 12 * sum((each - centre) ** 2 for each in without)) ** 0.5
    assert lds.mean_correlation(one, other) == (pytest.approx(mean(list(range(12)))), pytest.approx(error))


def test_a_forecast_from_nothing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lds, "forecast", lambda *given: (0.5, 0.01))
    with pytest.raises(SystemExit, match="WRONG RESULT: random influence foretells retraining"):
        lds.measure(Report("toy", "Does it run?"), sizes(), tmp_path)
