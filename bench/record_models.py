"""What does recording a network's gradients add to training it? Figures 28 and 29 (a to c) of the MetaStore paper.

VGG16 with images of CIFAR-10 and BERT with texts of AG News, all parameters recorded. Each round, in turns: the plain
training loop; the same loop with each step inside ``recorder.step``; plain forward and backward passes over the
samples in evaluation mode; ``recorder.collect`` of the same samples; and storing full gradients, made by torch.func's
vmap of grad and written to the disk in float32, of few samples, since they take so much room. ``collect`` ends with a
commit, synced to the disk, and so does what is stored in full. Exits with 1 when a recorded gradient is not autograd's
or a promise is missed. torch has one thread (``OMP_NUM_THREADS`` gives it more), for two that share two processors with
the thread that writes, and with whatever else runs, wait for each other more than they compute.

The paper's networks, VGG16 of width 64 and BERT-base, and smaller ones: the fewer numbers a layer has, the fewer
operations a step makes for each number that is recorded.

    python -m bench.record_models
    python -m bench.record_models --full         # more samples and rounds
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

import metaql
from bench.report import Report, require, subplots, table
from bench.timing import Seconds, interleaved, median, median_ratio
from bench.workloads import Workload, bert, vgg
from metaql.storage.blocks import lay_out
from metaql.storage.store import Store

STEP_LIMIT, COLLECT_LIMIT, TOLERANCE = 1.2, 1.5, 1e-4
COLUMNS = {
    "network": "network",
    "parameters": "parameters",
    "samples": "samples",
    "loop": "training loop, ms a sample",
    "step": "with step, ms",
    "passes": "passes, ms",
    "collect": "collect, ms",
    "full": "full gradients, ms",
    "step_ratio": "step / loop",
    "collect_ratio": "collect / passes",
    "step_cpu": "step / loop, CPU",
    "collect_cpu": "collect / passes, CPU",
    "full_ratio": "full / passes",
    "bytes": "recorded, bytes a sample",
    "full_bytes": "in full, bytes",
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured; ``stored`` samples in full."""

    samples: int
    batch: int
    stored: int
    rounds: int


class Ways:
    """What takes turns, over one workload; the two recorders stay open, as beside a long training."""

    def __init__(self, workload: Workload, sizes: Sizes, folder: Path) -> None:
        self.workload, self.sizes, self.folder = workload, sizes, folder
        # As a loader hands them out: what belongs to no sample's gradient is not part of a step.
        self.batches = [(ids, *workload.batch(ids)) for ids in torch.arange(sizes.samples).split(sizes.batch)]
        self.names = [name for name, each in workload.model.named_parameters() if each.requires_grad]
        # Every update is made and moves nothing, so that all rounds compute the same, at the checkpoint's weights.
        self.optimizer = torch.optim.SGD(workload.model.parameters(), lr=0.0, momentum=0.9)
        self.stepping = metaql.Recorder(workload.model, folder / "step")
        self.collecting = metaql.Recorder(workload.model, folder / "collect")
        self.collecting.checkpoint()
        self.rounds = itertools.count()

    def all(self) -> dict[str, Callable[[], object]]:
        """By name."""
        return {
            "loop": self.loop,
            "step": self.step,
            "passes": self.passes,
            "collect": self.collect,
            "full": self.store_in_full,
        }

    def loop(self) -> None:
        """The training loop; dropout is off in both loops, so that they compute the same."""
        for _, inputs, targets in self.batches:
            self.optimizer.zero_grad()
            self.workload.loss(inputs, targets).backward()
            self.optimizer.step()

    def step(self) -> None:
        """The same, recorded; what is recorded is committed now and then, by itself."""
        for ids, inputs, targets in self.batches:
            self.optimizer.zero_grad()
            with self.stepping.step(ids, self.optimizer):
                self.workload.loss(inputs, targets).backward()
            self.optimizer.step()

    def passes(self) -> None:
        """Forward and backward passes alone."""
        for _, inputs, targets in self.batches:
            self.workload.model.zero_grad()
            self.workload.loss(inputs, targets).backward()

    def collect(self) -> None:
        """The same samples, recorded at a checkpoint, and committed."""
        batches = self.workload.batches(range(self.sizes.samples), self.sizes.batch)
        self.collecting.collect(batches, f"round {next(self.rounds)}")

    def store_in_full(self) -> None:
        """All parameters' gradients of each sample, to a file."""
        with (self.folder / "full").open("wb") as file:
            for places in torch.arange(self.sizes.stored).split(4):
                part = range(int(places[0]), int(places[-1]) + 1)
                file.write(self.workload.gradients(part, self.names).numpy())
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Closes the recorders."""
        self.stepping.close()
        self.collecting.close()


def measure(report: Report, workload: Workload, sizes: Sizes) -> None:
    """Adds the row of one network."""
    print(f"measuring {workload.name}, {sizes.samples} samples in batches of {sizes.batch}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        ways = Ways(workload, sizes, Path(folder))
        times = interleaved(ways.all(), sizes.rounds)
        ways.close()
        with closing(Store.open(Path(folder) / "collect")) as store:
            require(is_exact(workload, store), f"gradients of {workload.name} that were recorded are not autograd's")
            files = [one.file for one in store.manifest.collections[0].segments]
    parameters = sum(each.numel() for each in workload.model.parameters() if each.requires_grad)
    each = {name: milliseconds(one, sizes.stored if name == "full" else sizes.samples) for name, one in times.items()}
    report.add(
        network=workload.name,
        parameters=parameters,
        samples=sizes.samples,
        **each,
        step_ratio=median_ratio(times["step"], times["loop"]),
        collect_ratio=median_ratio(times["collect"], times["passes"]),
        step_cpu=median_ratio(times["step"], times["loop"], "cpu"),
        collect_cpu=median_ratio(times["collect"], times["passes"], "cpu"),
        full_ratio=each["full"] / each["passes"],
        bytes=sum(file.bytes for file in files) // sizes.samples,
        full_bytes=4 * parameters,
        rounds={name: [one.wall for one in some] for name, some in times.items()},
    )


def smaller(workload: Workload, how: str) -> Workload:
    """Under a name that says so."""
    return replace(workload, name=f"{workload.name}, {how}")


def milliseconds(times: list[Seconds], samples: int) -> float:
    """Of one sample."""
    return median(times) * 1e3 / samples


def is_exact(workload: Workload, store: Store) -> bool:
    """Whether the gradients of the first collection's first and last sample are autograd's."""
    for row in (0, store.manifest.collections[0].rows - 1):
        workload.model.zero_grad()
        workload.loss(*workload.batch(slice(row, row + 1))).backward()
        grads = {name: each.grad for name, each in workload.model.named_parameters() if each.grad is not None}
        for layer in store.layers:
            found = lay_out(layer, store.read(layer, np.array([row])))[0]
            parts = [grads[each.name].flatten() for each in layer.parameters]
            if not _agree(found, torch.cat(parts)):
                return False
    return True


def _agree(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).norm()) <= TOLERANCE * float(expected.norm()) + 1e-7


def judge(report: Report) -> None:
    """The promises."""
    for key, limit, text in (
        ("step_ratio", STEP_LIMIT, "a training step inside recorder.step takes at most {} times a plain one"),
        ("collect_ratio", COLLECT_LIMIT, "collect takes at most {} times plain forward and backward passes"),
    ):
        found = ", ".join(f"{row['network']} {row[key]:.2f}" for row in report.rows)
        report.promise(text.format(limit), all(row[key] <= limit for row in report.rows), found)
    faster = [min(row["full"] / row["step"], row["full"] / row["collect"]) for row in report.rows]
    found = ", ".join(f"{row['network']} {each:.1f} times" for row, each in zip(report.rows, faster, strict=True))
    report.promise("both are faster than storing full gradients", all(each > 1 for each in faster), found)


def plot(report: Report) -> Any:
    """Milliseconds a sample of each way."""
    figure, axes = subplots(1, len(report.rows), figsize=(5 * len(report.rows), 4), squeeze=False)
    names = {"loop": "loop", "step": "with step", "passes": "passes", "collect": "collect", "full": "in full"}
    for axis, row in zip(axes[0], report.rows, strict=True):
        axis.bar(list(names.values()), [row[key] for key in names])
        axis.set_yscale("log")
        axis.set_title(row["network"])
    axes[0][0].set_ylabel("ms a sample")
    return figure


def main() -> int:
    """Prints the table; 0 when gradients agree and the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more samples and rounds")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = Report("record_models", "What does recording a network's gradients add to training it?")
    images, texts, rounds = (512, 64, 5) if options.full else (128, 32, 3)
    measure(report, vgg(images), Sizes(images, 64, 4, rounds))
    measure(report, smaller(vgg(256, width=32), "half as wide"), Sizes(256, 64, 16, rounds))
    measure(report, bert(texts, 64), Sizes(texts, 16, 2, rounds))
    measure(report, smaller(bert(64, 64, width=256, layers=4), "4 layers of 256"), Sizes(64, 16, 8, rounds))
    judge(report)
    report.remark(
        "Times are medians of the rounds, ratios medians of the rounds' ratios. The first round, in which a recorder"
        " compares a few samples with autograd, is not counted"
    )
    return report.write([table(report.rows, COLUMNS)], plot(report))


if __name__ == "__main__":
    sys.exit(main())
