"""The comparison with other libraries, on a toy, without any of them."""

import math
from pathlib import Path

import pytest
import torch

import metaql
from bench.elite_peers import PEERS
from bench.peers import exact
from bench.peers.case import NETWORKS, Case
from bench.peers.environments import REQUIREMENTS, python
from bench.peers.findings import page, promises
from bench.peers.metaql import EKFAC, NEW, NEW_LAST, PRECONDITIONED, RECORDED, _scores
from bench.peers.way import ALL
from bench.peers.ways import WAYS
from bench.peers.worker import measure
from bench.report import Report


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    parts = [(torch.rand(n, 1, 28, 28), torch.randint(0, 10, (n,))) for n in (30, 12, 12)]
    return Case("MLP", NETWORKS["MLP"]().state_dict(), parts[0], parts[1:])


@pytest.fixture(scope="module")
def expected(case: Case) -> list[torch.Tensor]:
    return exact.scores(case)


def test_exact_scores_are_inner_products_of_gradients(case: Case, expected: list[torch.Tensor]) -> None:
    model = case.model()
    gradients = []
    for (images, labels), place in ((case.train, 3), (case.queries[1], 5)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(images[place][None]), labels[place][None]).backward()
        gradients.append(torch.cat([each.grad.flatten() for each in model.parameters()]))
    torch.testing.assert_close(expected[1][3, 5].float(), gradients[0] @ gradients[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [NEW, RECORDED, "torch.func", "torch.func, gradients kept in memory"])
def test_scores_of_both_queries(name: str, case: Case, expected: list[torch.Tensor], tmp_path: Path) -> None:
    measured = measure(name, case, tmp_path)
    assert measured.cold > measured.importing >= 0
    assert measured.second > 0
    assert measured.memory > 1e6
    assert (measured.disk > 0) == (name in (NEW, RECORDED))
    for number in (0, 1):
        scores = torch.load(tmp_path / f"scores{number}.pt", weights_only=True)
        assert exact.error(scores, expected[number]) < 1e-5
        assert exact.spearman(scores, expected[number]) > 0.9999


def test_ten_best(case: Case, expected: list[torch.Tensor], tmp_path: Path) -> None:
    measure("MetaQL, ten best of each", case, tmp_path)
    scores = torch.load(tmp_path / "scores1.pt", weights_only=True)
    assert exact.has_ten_best(scores, expected[1])
    assert exact.error(scores, expected[1]) < 1e-5
    worst = torch.where(scores.isnan(), -expected[1].float(), torch.nan)
    assert not exact.has_ten_best(worst, expected[1])


def test_ekfac_is_preconditioned(case: Case, expected: list[torch.Tensor], tmp_path: Path) -> None:
    measure(EKFAC, case, tmp_path)
    scores = torch.load(tmp_path / "scores1.pt", weights_only=True)
    assert bool(scores.isfinite().all())
    assert 0.1 < exact.spearman(scores, expected[1]) < 0.999
    assert WAYS[EKFAC].agrees_with in WAYS
    # With a damping that drowns the curvature they are inner products, divided by it.
    with metaql.connect(tmp_path / "own/store") as database:
        drowned = _scores(case, database, 1, PRECONDITIONED.replace("'ekfac'", "'ekfac', damping := 1e6"))
    assert exact.error(drowned * 1e6, expected[1]) < 1e-3


def test_last_layer_is_not_the_whole(case: Case, expected: list[torch.Tensor], tmp_path: Path) -> None:
    measure(NEW_LAST, case, tmp_path)
    scores = torch.load(tmp_path / "scores0.pt", weights_only=True)
    assert exact.error(scores, expected[0]) > 1e-3


def test_error_and_correlation(expected: list[torch.Tensor]) -> None:
    wrong = expected[0].clone()
    wrong[2, 3] = math.inf
    assert exact.error(wrong, expected[0]) == math.inf
    assert exact.error(expected[0] * 1.01, expected[0]) == pytest.approx(0.01)
    assert exact.spearman(-expected[0], expected[0]) == pytest.approx(-1)
    assert exact.spearman(expected[0].exp(), expected[0]) == pytest.approx(1)


def test_every_library_has_its_requirements() -> None:
    needed = {way.package for way in WAYS.values() if not way.ours} | {"cleanlab"}
    needed |= {peer.package for peer in PEERS.values()}
    assert needed == {file.stem for file in REQUIREMENTS.glob("*.txt")}
    assert all("==" in line for name in needed for line in (REQUIREMENTS / f"{name}.txt").read_text().split())


def test_an_environment_that_is_there_is_taken(tmp_path: Path) -> None:
    (tmp_path / "captum").mkdir()
    (tmp_path / "captum" / "requirements.txt").write_text((REQUIREMENTS / "captum.txt").read_text())
    assert python(tmp_path, "captum").is_relative_to(tmp_path / "captum")


def test_page_and_promises() -> None:
    report = Report("peers", "?")
    about = {"version": "1", "cold_cpu": 1.0, "second_cpu": 1.0, "importing": 0.1, "memory_mb": 1.0, "disk_mb": 1.0}
    times = {NEW: (1.0, 0.1), RECORDED: (1.0, 0.01), "torch.func": (2.0, 2.0), "captum TracInCP": (3.0, 1.5)}
    for name, (cold, second) in times.items():
        report.add(
            network="MLP", way=name, covers=ALL, cold=cold, second=second, spearman=1.0, difference=1e-7, **about
        )
    report.add(network="MLP", way="TRAK", covers=ALL, error="it broke")
    promises(report)
    assert [one.kept for one in report.promises] == [False, True, True, True]
    assert "15 times" in report.promises[0].measured
    assert "TRAK failed on MLP: `it broke`" in page(report)[-1]
