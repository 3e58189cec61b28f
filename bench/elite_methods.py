"""What is compared: ELITE, what it is made of alone, and detectors of other libraries."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.elite_cases import Case
from bench.elite_peers import FAILED, PEERS
from bench.peers.environments import python
from bench.peers.run import environment
from bench.rankings import auc
from metaql.methods.elite import Fitted, Settings, fit

ELITE, SVDD, DEEP_SAD, ALONE = "ELITE (SVDD)", "Deep SVDD", "DeepSAD", "labels alone"
ELITE_AE, AE = "ELITE (auto-encoder)", "auto-encoder"
FOREST = "Isolation Forest (scikit-learn)"


@dataclass(frozen=True)
class Own:
    """A detector of MetaQL's, at its defaults; and whether it is given the labels."""

    detector: str
    labels: bool = True


OWN = {
    ELITE: Own("svdd"),
    ALONE: Own("supervised"),
    DEEP_SAD: Own("deepsad"),
    SVDD: Own("svdd", labels=False),
    ELITE_AE: Own("autoencoder"),
    AE: Own("autoencoder", labels=False),
}


def scores(method: str, case: Case) -> tuple[Tensor, float]:
    """A method of this process: the scores of the test rows, and the CPU seconds of training."""
    begin = time.process_time()
    if method == FOREST:
        from sklearn.ensemble import IsolationForest

        forest = IsolationForest(random_state=case.seed).fit(case.train.flatten(1).numpy())
        seconds = time.process_time() - begin
        return -torch.from_numpy(forest.score_samples(case.test.features.flatten(1).numpy())), seconds
    fitted = trained(method, case)
    seconds = time.process_time() - begin
    return fitted.score(case.test.features), seconds


def trained(method: str, case: Case, **settings: Any) -> Fitted:
    """One of MetaQL's own, with other settings than the defaults if there are any."""
    own = OWN[method]
    labelled, is_anomaly = (case.labelled.features, case.labelled.is_anomaly) if own.labels else (None, None)
    return fit(case.train, labelled, is_anomaly, Settings(detector=own.detector, seed=case.seed, **settings))


def row(method: str, case: Case, found: Tensor, seconds: float) -> dict[str, Any]:
    """A row of the report."""
    return {
        "data": case.name,
        "pollution": case.pollution,
        "run": case.seed,
        "method": method,
        "auc": auc(found, case.test.is_anomaly),
        "seconds": seconds,
        "samples": len(case.train),
    }


def peer_rows(cases: Sequence[Case], environments: Path) -> Iterator[dict[str, Any]]:
    """The same of the other libraries, each in a process and an environment of its own; ``error`` where one fails."""
    for package in dict.fromkeys(peer.package for peer in PEERS.values()):
        with tempfile.TemporaryDirectory() as folder:
            torch.save([plain(case) for case in cases], Path(folder) / "cases.pt")
            ended = subprocess.run(
                [str(python(environments, package)), "-m", "bench.elite_peers", package, folder],
                env=environment(),
                check=False,
                stdout=sys.stderr,
            )
            for method in (name for name, peer in PEERS.items() if peer.package == package):
                for place, case in enumerate(cases):
                    yield _peer_row(method, case, Path(folder) / f"{method}-{place}.pt", ended.returncode)


def _peer_row(method: str, case: Case, file: Path, status: int) -> dict[str, Any]:
    if not file.exists():
        return {"data": case.name, "pollution": case.pollution, "method": method, "error": f"exit status {status}"}
    found = torch.load(file, weights_only=True)
    if FAILED in found:
        return {"data": case.name, "pollution": case.pollution, "method": method, "error": found[FAILED]}
    return row(method, case, found["scores"], found["seconds"])


def plain(case: Case) -> dict[str, Any]:
    """What other libraries take: rows [n, d], and a seed."""
    return {
        "train": case.train.flatten(1),
        "labelled": case.labelled.features.flatten(1),
        "is_anomaly": case.labelled.is_anomaly,
        "test": case.test.features.flatten(1),
        "seed": case.seed,
    }
