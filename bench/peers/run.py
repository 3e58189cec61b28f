"""Runs ways in turns, each in a process of its own, and compares what they answer."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.peers import exact
from bench.peers.case import Case
from bench.peers.environments import python
from bench.peers.way import ALL, Way
from bench.peers.worker import MEASURED

ROOT = Path(__file__).parents[2]
MEGABYTE = 1e6


@dataclass(frozen=True)
class Limits:
    """Seconds for one process, and how often each way has its turn."""

    seconds: float
    rounds: int


class WayError(Exception):
    """A way ended without scores; the text is its last line."""


def rows(case: Case, ways: list[Way], environments: Path, limits: Limits) -> Iterator[dict[str, Any]]:
    """A row of the report for each way, with medians over the rounds; ``error`` says why there are no figures."""
    expected = exact.scores(case)
    approximations: dict[str, list[Tensor]] = {}
    measured: dict[str, list[dict[str, Any]]] = {way.name: [] for way in ways}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "case.pt"
        case.save(path)
        for _ in range(limits.rounds):
            for way in ways:
                if way.name in failures:
                    continue
                try:
                    row, scores = _measured(way, path, environments, limits.seconds, expected)
                    measured[way.name].append(row)
                    if not way.exact:
                        approximations[way.name] = scores
                except WayError as failure:
                    failures[way.name] = str(failure)
    for way in ways:
        about = {"network": case.network, "way": way.name, "covers": way.covers}
        if way.name in failures:
            yield {**about, "error": failures[way.name]}
        else:
            yield {**about, **_medians(measured[way.name]), **_likeness(way, approximations)}


def _likeness(way: Way, found: dict[str, list[Tensor]]) -> dict[str, float]:
    """The worse of both queries' rank correlation with the way that computes the same, if that ran."""
    if way.agrees_with not in found:
        return {}
    pairs = zip(found[way.name], found[way.agrees_with], strict=True)
    return {"likeness": min(exact.spearman(own, other.double()) for own, other in pairs)}


def _measured(
    way: Way, case: Path, environments: Path, seconds: float, expected: list[Tensor]
) -> tuple[dict[str, Any], list[Tensor]]:
    with tempfile.TemporaryDirectory() as folder:
        found = _process(way, case, Path(folder), environments, seconds)
        scores = [torch.load(Path(folder) / f"scores{number}.pt", weights_only=True) for number in (0, 1)]
    return {**found, **_agreement(way, list(zip(scores, expected, strict=True)))}, scores


def _agreement(way: Way, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The worse of both queries; what is not meant to be exact may be of another scale, and has no error."""
    found = {}
    if way.exact:
        found["difference"] = max(exact.error(*pair) for pair in pairs)
    if not way.ten_best:
        found["spearman"] = min(exact.spearman(*pair) for pair in pairs)
    elif not all(exact.has_ten_best(*pair) for pair in pairs):
        raise WayError("the ten best are others")
    return found


def _process(way: Way, case: Path, folder: Path, environments: Path, seconds: float) -> dict[str, Any]:
    arguments = ["bench.peers.worker", way.name, str(case), str(folder)]
    run(lambda: Path(sys.executable) if way.ours else python(environments, way.package), arguments, folder, seconds)
    return dict(json.loads((folder / MEASURED).read_text()))


def run(interpreter: Callable[[], Path], module: list[str], folder: Path, seconds: float) -> None:
    """Runs a module with its arguments in the folder; WayError says why it did not end well."""
    try:
        ended = subprocess.run(
            [str(interpreter()), "-m", *module],
            cwd=folder,
            env=environment(),
            timeout=seconds,
            capture_output=True,
            text=True,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise WayError(f"took more than {seconds:.0f} s") from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise WayError(f"could not be installed: {error}") from None
    if ended.returncode:
        raise WayError((ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"])[-1])


def environment() -> dict[str, str]:
    """One thread, and no network to ask for models."""
    pinned = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS")}
    return {**os.environ, **pinned, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    row = {key: rounds[0][key] for key in ("version", "spearman", "difference") if key in rounds[0]}
    for key in ("cold", "cold_cpu", "importing", "second", "second_cpu"):
        row[key] = statistics.median(each[key] for each in rounds)
    row["memory_mb"] = max(each["memory"] for each in rounds) / MEGABYTE
    row["disk_mb"] = rounds[0]["disk"] / MEGABYTE
    row["cold_rounds"], row["second_rounds"] = ([each[key] for each in rounds] for key in ("cold", "second"))
    return row


def is_exact_over_all(way: Way) -> bool:
    """Whether a way is meant to give what ours give."""
    return way.exact and way.covers == ALL and not way.ten_best
