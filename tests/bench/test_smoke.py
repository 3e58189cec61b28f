"""Every benchmark's core at a toy size: that it runs, checks its results, and writes its page."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import data, floor, growth, mislabelled, models, p2b, p2p, record_models, storage, workloads
from bench.report import Report, table
from bench.workloads import Workload


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Benchmarks set the number of threads and the seed."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def report() -> Report:
    """An empty one."""
    return Report("toy", "Does it run?")


def images(samples: int) -> Workload:
    """A narrow VGG16 and noise."""
    model = models.VGG(2).eval()
    return Workload("VGG16", model, {"images": torch.randn(samples, 3, 32, 32)}, torch.randint(0, 10, (samples,)))


def texts(samples: int, length: int = 5) -> Workload:
    """A small BERT, and sentences of random words, the last of which are padding."""
    model = models.bert(vocabulary=20, width=16, layers=2).eval()
    numbers, mask = torch.randint(1, 20, (samples, length)), torch.ones(samples, length, dtype=torch.int64)
    mask[: samples // 2, -2:] = 0
    inputs = {"input_ids": numbers * mask, "attention_mask": mask}
    return Workload("BERT", model, inputs, torch.randint(0, 4, (samples,)))


def write(report: Report, figure: Any, folder: Path) -> dict[str, Any]:
    """The raw numbers as they were written, beside a page and a plot."""
    report.write([table(report.rows)], figure, folder)
    assert (folder / "toy.png").stat().st_size > 0
    assert "# Does it run?" in (folder / "toy.md").read_text()
    found: dict[str, Any] = json.loads((folder / "toy.json").read_text())
    return found


def test_storage(report: Report, tmp_path: Path) -> None:
    vgg, bert = images(4), texts(4)
    storage.measure(report, vgg, storage.rows_of_vgg(vgg), "VGG16", tmp_path)
    storage.measure(report, bert, storage.rows_of_bert((0, 1), published=True), "BERT", tmp_path)
    storage.judge(report)
    rows = {row["layer"]: row for row in write(report, storage.plot(report), tmp_path)["rows"]}
    assert len(rows) == 4 + 5
    # Two input and two output maps of 16x16 channels; 5 positions of two vectors of width 16, in four linears.
    assert rows["VGG16, conv7"]["paper_size"] == 4 * (8 + 8) * 8 * 8
    assert rows["BERT, attention of layer 0"]["paper_size"] == 4 * 4 * 5 * 32
    assert rows["VGG16, conv1"]["why"] == "the full layout"
    assert "80%" in rows["BERT, query of layer 1"]["why"]


def test_p2p(report: Report, tmp_path: Path) -> None:
    sizes = p2p.Sizes(samples=12, queries=4, recomputed=3, rounds=1, file_bytes=1e5)
    p2p.of_layers(report, tmp_path, images(16), {"conv13": ["features.28"]}, sizes)
    p2p.of_layers(report, tmp_path, texts(16), {"attention": workloads.attention(0)}, sizes)
    p2p.of_linear(report, tmp_path, [4, 8], [12], 4, sizes)
    p2p.judge(report)
    found = write(report, p2p.plot(report), tmp_path)
    assert [row["section"] for row in found["rows"]] == 2 * ["layers"] + 2 * ["widths"]
    assert all(row["cold"] > 0 and row["pre"] > 0 and row["re"] > 0 for row in found["rows"])


def test_p2p_finds_wrong_scores(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_torch = Workload.gradients
    monkeypatch.setattr(Workload, "gradients", lambda *given: 1.01 * of_torch(*given))
    with pytest.raises(SystemExit, match="WRONG RESULT: scores of linear 4x4 differ"):
        p2p.of_linear(report, tmp_path, [4], [12], 4, p2p.Sizes(12, 4, 3, 1, 1e6))


def test_p2b(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Iterate is measured on fewer samples where it would take more than this.
    monkeypatch.setattr(p2b, "MOST", 1e6)
    p2b.measure(report, 1, 100, [1, 8], 1)
    p2b.measure(report, 3, 20, [4], 1)
    p2b.judge(report)
    found = write(report, p2b.plot(report), tmp_path)
    assert [(row["positions"], row["queries"]) for row in found["rows"]] == [(1, 1), (1, 8), (3, 4)]
    assert found["rows"][0]["measured"] == "100 and 100 samples"
    assert found["rows"][2]["measured"] == "20 and 20 samples"


def test_record_models(report: Report, tmp_path: Path) -> None:
    record_models.measure(report, images(8), record_models.Sizes(8, 4, 2, 1))
    record_models.measure(report, texts(8), record_models.Sizes(8, 4, 2, 1))
    record_models.judge(report)
    found = write(report, record_models.plot(report), tmp_path)
    assert [row["network"] for row in found["rows"]] == ["VGG16", "BERT"]
    assert len(found["promises"]) == 3


def test_mislabelled(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = torch.randn(80, 3, 32, 32), torch.randint(0, 10, (80,))
    monkeypatch.setattr(data, "cifar10", lambda split: some)
    labels = mislabelled.flipped(some[1], 0.1)
    assert int((labels != some[1]).sum()) == 8
    moved = mislabelled.swapped(some[1], 0.02)
    assert some[1][moved != some[1]].tolist() == [0, 0]
    assert moved[moved != some[1]].tolist() == [1, 1]
    mislabelled.measure(report, "10 % flipped", labels, mislabelled.Sizes(1, 80, 60, 1, 8))
    mislabelled.judge(report)
    rows = write(report, mislabelled.plot(report), tmp_path)["rows"]
    assert [row["ranking"] for row in rows] == list(mislabelled.RANKINGS)
    assert {len(row["precisions"]) for row in rows} == {14}
    assert len(set(rows[-1]["precisions"])) == 1, "the loss is no sum over layers"
    # By one layer all ways of taking the cosine are the same.
    assert rows[0]["precisions"][0] == rows[1]["precisions"][0] == rows[2]["precisions"][0]
    assert rows[0]["auc_last"] == pytest.approx(rows[1]["auc_last"]) == pytest.approx(rows[2]["auc_last"])
    assert {(row["samples"], row["ranked"]) for row in rows} == {(80, 60)}
    assert all(0 <= row["auc"] <= 1 for row in rows)


def test_growth(report: Report, tmp_path: Path) -> None:
    growth.measure(report, "layers", 20, 2, 1, 1)
    growth.measure(report, "checkpoints", 20, 1, 2, 1)
    growth.judge(report)
    assert len(write(report, growth.plot(report), tmp_path)["rows"]) == 2
    assert growth.slope([(1, 3), (10, 300), (100, 30_000)]) == pytest.approx(2)


def test_floor(report: Report, tmp_path: Path) -> None:
    machine = floor.rates(1, megabytes=1, size=32, rounds=1)
    for query in ("P2B", "P2P"):
        floor.measure(report, query, [(8, 8, 1), (8, 4, 2)], (30, 12), 1, machine)
    rows = write(report, floor.plot(report), tmp_path)["rows"]
    assert [row["megabytes"] for row in rows] == 2 * [4 * 42 * (16 + 2 * 12) / 1e6]


@pytest.mark.data
def test_workloads_of_real_data() -> None:
    if not data.FOLDER.exists():
        pytest.skip("METAQL_DATA names no folder with the data sets (bench/README.md)")
    for workload in (workloads.vgg(4, width=1), workloads.bert(4, 8, width=16, layers=1)):
        workload.model.zero_grad()
        workload.loss(*workload.batch(slice(1, 2))).backward()
        expected = workload.model.get_parameter("classifier.weight").grad
        found = workload.gradients(range(1, 2), ["classifier.weight"])[0]
        torch.testing.assert_close(found, expected.flatten())
