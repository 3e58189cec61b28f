"""The anomaly benchmarks at a toy size: their cases, promises and pages."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import data, elite, elite_cases, elite_labels, elite_methods, elite_time
from bench.elite import Sizes
from bench.elite_cases import Rows, Source, drawn
from bench.elite_methods import ALONE, DEEP_SAD, ELITE, FOREST, SVDD
from bench.elite_peers import FAILED, Peer, answer
from bench.report import Report
from metaql.methods.elite import Settings, fit, networks

TOY = Sizes(samples=60, side=4, runs=1, classes=(0,), pollutions=(0.1, 0.5))


def source(*_: Any, name: str = "toy", shape: tuple[int, ...] = (3,)) -> Source:
    """A half is normal, the rest of nine kinds of anomalies, which are further out the higher they are."""
    generator = torch.Generator().manual_seed(0)
    places = torch.arange(200)
    kind = torch.where(places % 2 == 0, 0, 1 + places // 2 % 9)
    features = torch.randn(200, *shape, generator=generator) + kind.reshape(-1, *[1] * len(shape))
    return Source(name, Rows(features, kind), Rows(features[:60] + 0.1, kind[:60]))


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of one epoch, on the toy."""

    def trained(method: str, case: elite_cases.Case, **settings: Any) -> Any:
        own = elite_methods.OWN[method]
        known = (case.labelled.features, case.labelled.is_anomaly) if own.labels else (None, None)
        return fit(case.train, *known, settings=Settings(own.detector, **{"epochs": 1, **settings}))

    for module in (elite_methods, elite_labels, elite_time):
        monkeypatch.setattr(module, "trained", trained)


def write(report: Report, tables: list[str], figure: Any, folder: Path) -> str:
    """The page, beside raw numbers and a plot."""
    report.write(tables, figure, folder)
    assert (folder / "toy.png").stat().st_size > 0
    assert json.loads((folder / "toy.json").read_text())["rows"]
    return (folder / "toy.md").read_text()


@pytest.mark.parametrize("pollution", [0.1, 0.5])
def test_pollution_labels_and_training_rows(pollution: float) -> None:
    toy = source()
    case = drawn(toy, pollution, seed=1, samples=60)
    assert (len(case.train), int(case.hidden.sum())) == (60, round(60 * pollution))
    assert case.labelled.is_anomaly.tolist() == 10 * [False, True]
    rows = torch.cat([case.train, case.labelled.features])
    assert len(rows.unique(dim=0)) == 80, "labelled rows are not among the training rows"
    truth = {tuple(row.tolist()): bool(kind) for row, kind in zip(toy.train.features, toy.train.kind > 0, strict=True)}
    assert [truth[tuple(row.tolist())] for row in case.train] == case.hidden.tolist()
    fewer = drawn(toy, pollution, seed=1, samples=60, labels=4)
    assert torch.equal(fewer.labelled.features, case.labelled.features[:4])


def test_as_many_rows_at_each_pollution() -> None:
    sizes = {len(drawn(source(), pollution, 0, 10_000).train) for pollution in (0.1, 0.3, 0.5)}
    assert sizes == {100}, "100 normal rows less 10 labels, of which 0.9 must suffice"


def test_labels_of_some_kinds() -> None:
    case = drawn(source(), 0.5, 2, 60, labels=10, kinds=1)
    assert len(case.labelled.kind.unique()) == 2
    assert int(case.hidden.sum()) == 30


def test_series_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    (tmp_path / "timeseries").mkdir()
    times = numpy.arange(10 * elite_cases.STRETCH)
    numpy.savez(tmp_path / "timeseries/eeg_eye_state.npz", X=times[:, None].repeat(2, 1), y=times > 600)
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    found = elite_cases.eeg.__wrapped__(0)
    assert found.train.features.shape[1:] == (2, elite_cases.WINDOW)
    train, test = (set(part.features.flatten().tolist()) for part in (found.train, found.test))
    assert len(train) == 6 * elite_cases.STRETCH
    assert not train & test
    late = found.test.features.mean((1, 2)) > 600
    assert torch.equal(found.test.kind > 0, late)


def test_images_and_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numpy = pytest.importorskip("numpy")
    some = torch.rand(40, 1, 28, 28), torch.arange(40) % 10
    monkeypatch.setitem(elite_cases.IMAGES, "MNIST", lambda split: some)
    found = elite_cases.images.__wrapped__("MNIST", 3, 14, 0)
    assert found.train.features.shape == (40, 14, 14)
    torch.testing.assert_close(found.train.features[0, 0, 0], some[0][0, 0, :2, :2].mean())
    assert torch.equal(found.train.is_anomaly, some[1] != 3)
    (tmp_path / "adbench").mkdir()
    numpy.savez(tmp_path / "adbench/1_toy.npz", X=numpy.arange(50)[:, None], y=numpy.arange(50) % 5 == 0)
    monkeypatch.setattr(data, "FOLDER", tmp_path)
    found = elite_cases.tabular.__wrapped__("1_toy", 0)
    rows = torch.cat([found.train.features, found.test.features])[:, 0]
    assert (found.name, len(found.train.kind), sorted(rows.tolist())) == ("toy", 30, list(range(50)))
    assert torch.equal(found.test.kind == 1, found.test.features[:, 0] % 5 == 0)


@pytest.mark.usefixtures("short")
def test_pollution_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report("toy", "Does it run?")
    cases = [drawn(source(name=name), pollution, 0, 60) for name in ("cover", "MNIST") for pollution in (0.1, 0.5)]

    def other_rows(*_: Any) -> list[dict[str, Any]]:
        return [{"data": "cover", "pollution": 0.1, "method": "ECOD (PyOD)", "error": "it broke"}]

    monkeypatch.setattr(elite, "peer_rows", other_rows)
    elite.measure(report, cases, long=False, environments=tmp_path)
    elite.judge(report)
    elite.remarks(report, TOY)
    page = write(report, elite.tables(report), elite.plot(report), tmp_path)
    assert "ECOD (PyOD) failed: it broke" in page
    found = [row for row in report.rows if row["method"] == elite.AE]
    assert {row["data"] for row in found} == {"cover"}
    assert {row["method"] for row in report.rows if "auc" in row} == {*elite_methods.OWN, FOREST}
    assert all(0 <= row["auc"] <= 1 for row in report.rows if "auc" in row)


def found_by(**aucs: Callable[[float], float]) -> Report:
    """Of two data sets, whose AUC by each method is a function of the pollution."""
    names = {"elite": ELITE, "alone": ALONE, "sad": DEEP_SAD}
    report = Report("toy", "?")
    for data_set in ("one", "two"):
        for pollution in (0.1, 0.5):
            for key, name in names.items():
                report.add(data=data_set, pollution=pollution, run=0, method=name, auc=aucs[key](pollution), seconds=1)
    elite.judge(report)
    return report


def test_promises_can_fail() -> None:
    good = found_by(elite=lambda _: 0.9, alone=lambda _: 0.9, sad=lambda pollution: 0.9 - pollution)
    assert [each.kept for each in good.promises] == [True, True, True]
    bad = found_by(elite=lambda pollution: 0.9 - pollution / 10, alone=lambda _: 0.9, sad=lambda _: 0.8)
    assert [each.kept for each in bad.promises] == [False, False, False]


@pytest.mark.usefixtures("short")
def test_labels_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elite_labels, "source", lambda name, *_: source(name=name))
    report = Report("toy", "Does it run?")
    elite_labels.of_number(report, TOY)
    elite_labels.of_kinds(report, TOY)
    elite_labels.of_candidates(report, TOY)
    elite_labels.judge(report)
    page = write(report, elite_labels.tables(report), elite_labels.plot(report), tmp_path)
    assert len(report.promises) == 3
    assert page.count("| Fashion-MNIST |") == 3 + 4 + 4


def test_chosen_rows_get_their_true_labels() -> None:
    case = drawn(source(), 0.5, 0, 60, labels=10)
    fitted = fit(case.train, case.labelled.features, case.labelled.is_anomaly, Settings(epochs=1))
    chosen = elite_labels.chosen(fitted, case)
    assert {way: len(each.unique()) for way, each in chosen.items()} == {
        elite_labels.NONE: 0,
        elite_labels.BY_CANDIDATES: 20,
        elite_labels.BY_SCORE: 20,
        elite_labels.AT_RANDOM: 20,
    }
    best = chosen[elite_labels.BY_SCORE]
    assert fitted.anomaly_score[best].min() >= fitted.anomaly_score.sort(descending=True).values[20]
    more = elite_labels.with_labels(case, best).labelled
    assert len(more.kind) == 30
    assert torch.equal(more.is_anomaly[10:], case.hidden[best])


@pytest.mark.usefixtures("short")
def test_time_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("images", "tabular", "eeg"):
        shape = {"images": (8, 8), "tabular": (3,), "eeg": (2, 8)}[name]
        toy = source(name=name, shape=shape)
        monkeypatch.setattr(elite_time, name, lambda *_, toy=toy: toy)
    for name, value in {"BATCHES": (20,), "ROUNDS": 1, "STEPS": 3, "EPOCHS": (1, 2), "SETTLED": (1,)}.items():
        monkeypatch.setattr(elite_time, name, value)
    monkeypatch.setattr(networks.NETWORKS, "_registered", {})
    elite_time.register_network(elite_time.BATCH_NORM, elite_time.batch_norm)
    report = Report("toy", "Does it run?")
    elite_time.of_steps(report)
    elite_time.of_runs(report, TOY)
    elite_time.of_epochs(report, TOY)
    elite_time.judge(report)
    write(report, [*elite_time.tables(report)], elite_time.plot(report), tmp_path)
    steps = elite_time.rows_of(report, "step")
    assert [row["network"] for row in steps] == ["mlp", "mlp", "conv1d", "conv2d", elite_time.BATCH_NORM]
    assert all(row["ratio"] > 0 for row in steps)
    assert {row["way"]: row["settled"] is None for row in elite_time.rows_of(report, "run")}[elite_time.WITHOUT]
    assert {row["method"] for row in elite_time.rows_of(report, "epochs")} == {ELITE, ALONE, DEEP_SAD, SVDD}


def test_other_libraries_are_asked_with_standardised_rows() -> None:
    case = drawn(source(), 0.5, 3, 60)
    plain = elite_methods.plain(replace(case, train=case.train * torch.tensor([1.0, 10.0, 0.0])))
    seen = {}

    def detect(train: Any, labelled: Any, is_anomaly: Any, test: Any, seed: int) -> Any:
        seen.update(train=train, labels=is_anomaly.sum(), seed=seed)
        return test[:, 0]

    found = answer(Peer("none", detect), plain)
    assert found["scores"].shape == (60,)
    assert (seen["labels"], seen["seed"]) == (10, 3)
    spread = torch.from_numpy(seen["train"]).std(0)
    torch.testing.assert_close(spread, torch.tensor([1.0, 1.0, 0.0]))
    assert answer(Peer("none", lambda *_: 1 / 0), plain)[FAILED].startswith("ZeroDivisionError")
