"""What HYDRA's recording and query cost: a part of ``bench.hydra``.

LeNet-5 on Fashion-MNIST. As a program it records or queries once and prints what that took, so that memory is that of a
process which did nothing else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import metaql
from bench import data
from bench.memory import anonymous_bytes
from bench.rankings import spearman
from bench.recorded_training import Training, lenet, scores
from bench.report import Report, require
from bench.timing import interleaved, median, median_ratio
from metaql.storage.info import info

PAPER_SIZE = 50_000 * 20
INFLUENCE = "SELECT * FROM hydra()"
FULL_RECORDING = "all, float32"
# What a recorder is given, and every how many updates it records.
WAYS: dict[str, tuple[dict[str, Any], int]] = {
    FULL_RECORDING: ({}, 1),
    "all, bfloat16": ({"dtype": "bfloat16"}, 1),
    "one update in 2": ({}, 2),
    "one update in 5": ({}, 5),
    "linear layers": ({"layers": ["fc1", "fc2", "fc3"]}, 1),
    "last two layers": ({"layers": ["fc2", "fc3"]}, 1),
    "last layer": ({"layers": ["fc3"]}, 1),
}
COST = {
    "recorded": "recorded",
    "loop": "loop, ms a sample and step",
    "ratio": "times the plain loop",
    "bytes": "bytes a sample and step",
    "query": "query, s",
    "spearman": "Spearman with the full",
    "paper_loop": "50,000 x 20: loop, min",
    "paper_disk": "disk, GB",
    "paper_query": "query, min",
}
GROWTH = {
    "rows": "samples x epochs",
    "recording": "recording, MB of memory",
    "querying": "querying, MB",
    "query": "query, s",
    "disk": "disk, MB",
}


@dataclass(frozen=True)
class Sizes:
    """How much is trained and recorded."""

    samples: int
    validation: int
    training: Training
    rounds: int


@contextmanager
def watched() -> Iterator[list[int]]:
    """A list that holds the largest anonymous memory of this process while the context lasts, in bytes."""
    peak, watching = [anonymous_bytes()], True

    def watch() -> None:
        while watching:
            peak[0] = max(peak[0], anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        watching = False
        thread.join()


def plain(sizes: Sizes) -> Tensor:
    """Trains LeNet-5; its final weights."""
    model = lenet()
    images, labels = data.fashion_mnist("train")
    sizes.training.run(model, images[: sizes.samples], labels[: sizes.samples])
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def recorded(path: Path, way: str, sizes: Sizes) -> nn.Module:
    """The same, recorded into a new store."""
    model = lenet()
    images, labels = data.fashion_mnist("train")
    settings, every = WAYS[way]
    with metaql.Recorder(model, path, overwrite=True, **settings) as recorder:
        optimizer = sizes.training.run(
            model, images[: sizes.samples], labels[: sizes.samples], partial(recorder.step, every=every)
        )
        recorder.checkpoint(optimizer)
    return model


def collect_validation(path: Path, way: str, model: nn.Module, sizes: Sizes) -> None:
    """Records the query samples, which every run needs once."""
    images, labels = data.fashion_mnist("test")
    with metaql.Recorder(model, path, **WAYS[way][0]) as recorder:
        recorder.collect(TensorDataset(images[: sizes.validation], labels[: sizes.validation]), "validation")


def cost(report: Report, folder: Path, sizes: Sizes) -> None:
    """Adds a row for each way of recording; leaves their stores in the folder."""
    final: dict[str, Any] = {}
    # torch's first passes take longer than all others.
    plain(replace(sizes, training=Training(1)))

    def train(way: str) -> None:
        final[way] = recorded(folder / way, way, sizes) if way in WAYS else plain(sizes)

    times = interleaved({way: partial(train, way) for way in ("plain", *WAYS)}, sizes.rounds, warm_up=0)
    rows, full = sizes.samples * sizes.training.epochs, None
    report.add(
        section="cost",
        recorded="nothing",
        loop=median(times["plain"]) * 1e3 / rows,
        ratio=1.0,
        paper_loop=median(times["plain"]) / rows * PAPER_SIZE / 60,
    )
    for way in WAYS:
        weights = nn.utils.parameters_to_vector(final[way].parameters()).detach()
        require(torch.equal(weights, final["plain"]), f"recording ({way}) has changed the training")
        size = info(folder / way).bytes
        collect_validation(folder / way, way, final[way], sizes)
        begin = time.perf_counter()
        found = scores(folder / way, INFLUENCE, sizes.samples)
        seconds = time.perf_counter() - begin
        full = found if full is None else full
        report.add(
            section="cost",
            recorded=way,
            loop=median(times[way]) * 1e3 / rows,
            ratio=median_ratio(times[way], times["plain"]),
            bytes=size / rows,
            query=seconds,
            spearman=float(spearman(found, full)),
            paper_loop=median(times[way]) / rows * PAPER_SIZE / 60,
            paper_disk=size / rows * PAPER_SIZE / 1e9,
            paper_query=seconds / rows * PAPER_SIZE / 60,
            rounds=[each.wall for each in times[way]],
        )


def grow(report: Report, sizes: Sizes, lengths: Sequence[int]) -> None:
    """Adds rows of fresh processes that record, and then query, so many epochs."""
    for epochs in lengths:
        with tempfile.TemporaryDirectory() as folder:
            arguments = [str(each) for each in (sizes.samples, sizes.validation, epochs, folder)]
            measured = {**fresh("record", *arguments), **fresh("query", *arguments)}
            report.add(section="growth", rows=sizes.samples * epochs, **measured)


def fresh(part: str, *arguments: str) -> dict[str, float]:
    """What ``one_process`` returns in a process of its own."""
    command = [sys.executable, "-m", "bench.hydra_cost", part, *arguments]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def one_process(part: str, samples: str, validation: str, epochs: str, folder: str) -> dict[str, float]:
    """Records or queries; memory and disk in MB, and the query's seconds."""
    sizes, path = Sizes(int(samples), int(validation), Training(int(epochs)), 1), Path(folder) / "store"
    with watched() as peak:
        if part == "record":
            model = recorded(path, FULL_RECORDING, sizes)
            found = {"disk": info(path).bytes / 1e6}
            collect_validation(path, FULL_RECORDING, model, sizes)
        else:
            begin = time.perf_counter()
            scores(path, INFLUENCE, sizes.samples)
            found = {"query": time.perf_counter() - begin}
    return {"recording" if part == "record" else "querying": peak[0] / 1e6, **found}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(one_process(*sys.argv[1:])))
