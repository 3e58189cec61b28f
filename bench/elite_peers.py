"""Other libraries' detectors at their own defaults, in whichever environment has them: a part of ``bench.elite``.

python -m bench.elite_peers PACKAGE FOLDER           # FOLDER/cases.pt => FOLDER/METHOD-CASE.pt
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FAILED = "failed"
# Features standardised by the training rows, and labels: (train, labelled, is_anomaly, test, seed) => scores of test.
Detector = Callable[[Any, Any, Any, Any, int], Any]


@dataclass(frozen=True)
class Peer:
    """The package that has it, and how it is asked."""

    package: str
    detect: Detector


def _ecod(train: Any, labelled: Any, is_anomaly: Any, test: Any, seed: int) -> Any:
    from pyod.models.ecod import ECOD

    return ECOD().fit(train).decision_function(test)


def _deep_svdd(train: Any, labelled: Any, is_anomaly: Any, test: Any, seed: int) -> Any:
    from pyod.models.deep_svdd import DeepSVDD

    return DeepSVDD(train.shape[1], random_state=seed, verbose=0).fit(train).decision_function(test)


def _with_labels(name: str) -> Detector:
    def detect(train: Any, labelled: Any, is_anomaly: Any, test: Any, seed: int) -> Any:
        import numpy as np
        from deepod.models import tabular

        # 1 is a known anomaly; known normal rows are rows like all others.
        marks = np.concatenate([np.zeros(len(train)), is_anomaly])
        detector = getattr(tabular, name)(device="cpu", verbose=0, random_state=seed)
        return detector.fit(np.concatenate([train, labelled]), marks).decision_function(test)

    return detect


PEERS = {
    "ECOD (PyOD)": Peer("pyod", _ecod),
    "Deep SVDD (PyOD)": Peer("pyod", _deep_svdd),
    "DeepSAD (DeepOD)": Peer("deepod", _with_labels("DeepSAD")),
    "RoSAS (DeepOD)": Peer("deepod", _with_labels("RoSAS")),
}


def answer(peer: Peer, case: dict[str, Any]) -> dict[str, Any]:
    """The scores of the case's test rows and the CPU seconds that it took, or why there are none."""
    rows = [case[name].double() for name in ("train", "labelled", "test")]
    centre, deviation = rows[0].mean(0), rows[0].std(0)
    # A feature that is the same in all training rows says nothing.
    train, labelled, test = (
        torch.where(deviation > 0, (each - centre) / deviation, 0).float().numpy() for each in rows
    )
    torch.manual_seed(case["seed"])
    begin = time.process_time()
    try:
        scores = peer.detect(train, labelled, case["is_anomaly"].double().numpy(), test, case["seed"])
    except Exception as error:  # what a library may raise is not known, and belongs into the table
        return {FAILED: f"{type(error).__name__}: {error}"}
    return {"scores": torch.as_tensor(scores).double(), "seconds": time.process_time() - begin}


def main() -> None:
    """Asks all detectors of the package about all cases."""
    package, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    for place, case in enumerate(torch.load(folder / "cases.pt", weights_only=True)):
        for name, peer in PEERS.items():
            if peer.package == package:
                torch.save(answer(peer, case), folder / f"{name}-{place}.pt")
                print(name, place, flush=True)


if __name__ == "__main__":
    main()
