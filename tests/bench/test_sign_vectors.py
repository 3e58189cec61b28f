"""Clusters by contributions, at a toy size and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import metaql
from bench import data, sign_vectors
from bench.report import Report, table


@pytest.fixture(autouse=True)
def _noise(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    some = torch.rand(60, 1, 28, 28), torch.arange(60) % 10
    monkeypatch.setattr(data, "fashion_mnist", lambda split: some)


def test_all_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sign_vectors, "CHANCE", 1.0)
    report = Report("toy", "Does it run?")
    sign_vectors.measure(report, tmp_path / "store", 60, 5, 1)
    sign_vectors.judge(report)
    report.write([table(report.rows, sign_vectors.COLUMNS)], sign_vectors.plot(report), tmp_path)
    assert (tmp_path / "toy.png").stat().st_size > 0
    rows = json.loads((tmp_path / "toy.json").read_text())["rows"]
    # Of five test samples there are five classes.
    assert [row["width"] for row in rows] == [5, 5, 5, 5, 5, 5, 10, 196, None]
    with metaql.connect(tmp_path / "store") as db:
        found = sign_vectors.vectors(db, sign_vectors.CONTRIBUTIONS, 60)
        influence = [value for _, value in db.sql("SELECT * FROM hydra() ORDER BY sample_id").fetchall()]
    torch.testing.assert_close(found.mean(1), torch.tensor(influence, dtype=torch.float64), rtol=1e-4, atol=1e-7)


def test_clusters_are_found_and_judged() -> None:
    classes = torch.arange(60) % 10
    apart = torch.eye(10, dtype=torch.float64)[classes]
    assert sign_vectors.purity(sign_vectors.clustered(apart), classes.numpy()) == 1
    assert sign_vectors.purity(np.array([0, 0, 0, 1]), np.array([2, 2, 3, 3])) == 0.75
