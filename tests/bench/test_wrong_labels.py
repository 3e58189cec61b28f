"""The benchmarks of wrong labels at a toy size, and what they rank with."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench import cleaning, data, out_of_sample, wrong_labels
from bench.label_rankings import AVERAGE_LOSS, RANKINGS, record, suspicions
from bench.recorded_training import Training
from bench.report import Report, table

NAMED = "cleanlab, find_label_issues, of networks trained without it"


def small(seed: int = 0) -> nn.Module:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 10))


@pytest.fixture(autouse=True)
def _small_and_without_cleanlab(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    some = torch.randn(60, 1, 4, 4), torch.arange(60) % 10
    monkeypatch.setattr(data, "fashion_mnist", lambda split: some)
    for module in (cleaning, wrong_labels):
        monkeypatch.setattr(
            module, "cleanlab", lambda labels, predicted, _: (predicted[:, 0].double(), predicted[:, 0] > 0.1)
        )
    yield
    torch.set_num_threads(threads)


def test_rankings_of_outputs_are_what_they_say(tmp_path: Path) -> None:
    inputs, labels = torch.randn(40, 16), torch.arange(40) % 10
    training = Training(5, batch=8, rate=0.3)
    logits: list[Tensor] = []
    plain = small()
    training.run(plain, inputs, labels, after_epoch=lambda *_: logits.append(plain(inputs).detach()))
    model = small()
    splits = {"train": (inputs, labels), "validation": (inputs[:20], labels[:20])}
    record(tmp_path / "store", model, splits, training, in_run=True)
    found = suspicions(tmp_path / "store", RANKINGS, 40)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other)
    losses = torch.stack([F.cross_entropy(each, labels, reduction="none") for each in logits])
    torch.testing.assert_close(found[AVERAGE_LOSS].float(), losses.mean(0))
    distances = torch.stack([(each.softmax(1) - F.one_hot(labels, 10)).norm(dim=1) for each in logits])
    torch.testing.assert_close(found["EL2N, average of all epochs"].float(), distances.mean(0))
    torch.testing.assert_close(found["EL2N, first epoch"].float(), distances[0])
    right = torch.stack([each.argmax(1) == labels for each in logits])
    events = (right[:-1] & ~right[1:]).sum(0).double()
    events[~right.any(0)] = 1_000_000
    assert int((events == 1).sum()) > 0
    assert found["forgetting events"].tolist() == events.tolist()


def test_nobody_judges_what_it_was_trained_on() -> None:
    class Remembering(nn.Module):
        def forward(self, inputs: Tensor) -> Tensor:
            assert not torch.isin(inputs[:, 0], self.seen).any()
            return inputs

    class Remember(Training):
        def run(self, model: nn.Module, inputs: Tensor, *_: Any, **__: Any) -> Any:
            model.seen = inputs[:, 0]
            assert 15 < len(inputs) < 19

    inputs = torch.randn(22, 3)
    found = out_of_sample.cross_validated(Remembering, inputs, torch.zeros(22), Remember(1))
    torch.testing.assert_close(found, inputs.softmax(1))


def test_cleanlab_is_asked_in_its_own_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "cleanlab"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "rank.py").write_text("def get_label_quality_scores(labels, p): return p[range(len(labels)), labels]\n")
    (package / "filter.py").write_text("def find_label_issues(labels, p, n_jobs): return p.argmax(1) != labels\n")
    given = out_of_sample.environment()
    monkeypatch.setattr(
        out_of_sample, "environment", lambda: given | {"PYTHONPATH": f"{tmp_path}:{given['PYTHONPATH']}"}
    )
    monkeypatch.setattr(out_of_sample, "python", lambda folder, package: Path(sys.executable))
    predicted = torch.tensor([[0.9, 0.1], [0.8, 0.2]])
    doubt, issue = out_of_sample.cleanlab(torch.tensor([0, 1]), predicted, tmp_path)
    torch.testing.assert_close(doubt, torch.tensor([0.1, 0.8], dtype=torch.float64))
    assert issue.tolist() == [False, True]


def test_wrong_labels(tmp_path: Path) -> None:
    inputs, clean = data.fashion_mnist("train")
    given = clean.clone()
    given[:20] = (given[:20] + 1) % 10
    case = wrong_labels.Case("some", small, inputs, given, clean, (inputs, clean), Training(2, batch=20))
    report = Report("toy", "Does it run?")
    wrong_labels.measure(report, case, tmp_path)
    wrong_labels.judge(report)
    wrong_labels.remarks(report)
    rows = wrong_labels.of(report, "rankings")
    assert [row["ranking"] for row in rows][: len(RANKINGS)] == list(RANKINGS)
    report.write([wrong_labels.pivoted(rows, "auc")], wrong_labels.plot(report), tmp_path)
    assert NAMED in (tmp_path / "toy.md").read_text()
    assert (tmp_path / "toy.png").stat().st_size > 0
    named = wrong_labels.of(report, "named")
    assert [row["wrong"] for row in named] == [20, 20]
    assert all(0 <= row["recall"] <= 1 for row in named)


def test_the_best_are_kept() -> None:
    scores, labels = torch.tensor([5.0, 1.0, 2.0, 3.0, 0.0, 4.0]), torch.tensor([0, 0, 1, 1, 1, 1])
    assert sorted(cleaning.all_together(scores, 0.5).tolist()) == [1, 2, 4]
    assert sorted(cleaning.by_class(scores, labels, 0.5).tolist()) == [1, 2, 4]
    assert sorted(cleaning.by_class(-scores, labels, 0.5).tolist()) == [0, 3, 5]


def test_cleaning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "QUERIES", 30)
    report = Report("toy", "Does it run?")
    given = cleaning.task(60, Training(4, batch=20), 2, small)
    assert int(given.wrong.sum()) == 48
    cleaning.measure(report, given, tmp_path)
    cleaning.judge(report)
    cleaning.remarks(report, given)
    kept = {row["ranking"]: row for row in cleaning.of(report, "kept")}
    assert kept[cleaning.PERFECT]["right"] == kept[cleaning.PERFECT]["auc"] == 1
    others = {row["training"]: row for row in cleaning.of(report, "other")}
    assert others[cleaning.NO_FILTER]["samples"] == 60
    assert others[cleaning.TWICE]["samples"] == pytest.approx(12, abs=5)
    report.write([table(list(kept.values()), cleaning.KEPT)], cleaning.plot(report), tmp_path)
    assert (tmp_path / "toy.png").stat().st_size > 0


def test_a_falling_rate_ends_at_zero() -> None:
    inputs, labels = torch.randn(10, 16), torch.arange(10)
    optimizer = Training(3, batch=4, falling=True).run(small(), inputs, labels)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0)
    assert Training(3, batch=4).run(small(), inputs, labels).param_groups[0]["lr"] == 0.01
