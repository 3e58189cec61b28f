"""How long does it take to score every pair? Figures 24 to 26 of the MetaStore paper beside ours.

Of 100 query samples the ten best training samples each, one layer at a time, in three ways that give the same scores:
MetaQL (SQL over a store, asked of a connection opened just before, and once more), Pre-compute (the gradients laid out
in a float32 file that is mapped into memory, and a product of matrices) and Re-compute (the gradients of all samples
made anew by torch.func's vmap of grad, of this layer's parameters only; its product of matrices is not counted). One
thread each, in turns. Where the laid-out gradients would take too much room, or making them too much time, fewer are
measured, and their time is multiplied in proportion. Exits with 1 when scores differ or a promise is missed.

    python -m bench.p2p
    python -m bench.p2p --full                   # BERT-base, more samples, wider layers
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

import metaql
from bench.models import VGG
from bench.report import Report, require, subplots, table
from bench.stores import layer_bytes
from bench.timing import Seconds, median, seconds
from bench.workloads import Workload, attention, bert, linear, vgg
from metaql.storage.blocks import lay_out
from metaql.storage.schema import Layer
from metaql.storage.store import Store

QUERY = """
SELECT v.sample_id, inner_product(t.gradient, layers(v.gradient, ?)) AS score FROM train t, validation v
QUALIFY row_number() OVER (PARTITION BY v.sample_id ORDER BY score DESC) <= 10 ORDER BY v.sample_id, score DESC
"""
SOME = """
SELECT inner_product(t.gradient, layers(v.gradient, ?)) FROM train t, validation v
WHERE t.sample_id < ? AND v.sample_id < ? ORDER BY t.sample_id, v.sample_id
"""
# What a query costs before any gradient is read (bench/README.md), with room.
CONSTANT, LIMIT, TOLERANCE = 0.015, 1.3, 1e-4
# Of Pre-compute's products, which are sums of up to millions of terms in float32.
ROUNDING = 1e-3
COLUMNS = {
    "layer": "layer",
    "samples": "samples",
    "queries": "queries",
    "smaller": "full / factors",
    "connect": "connect, s",
    "cold": "MetaQL, CPU s",
    "cold_wall": "wall s",
    "again": "again, CPU s",
    "pre": "Pre-compute, CPU s",
    "pre_wall": "wall s",
    "re": "Re-compute, CPU s",
    "over_pre": "Pre-compute / MetaQL",
    "over_re": "Re-compute / MetaQL",
    "disk": "MetaQL from disk, wall s",
    "pre_disk": "Pre-compute from disk, wall s",
    "measured": "Pre-, Re-compute measured on",
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    samples: int = 500
    queries: int = 100
    recomputed: int = 32
    rounds: int = 3
    file_bytes: float = 1.2e9


@dataclass(frozen=True)
class Case:
    """Some modules of a recorded network, as one layer."""

    name: str
    workload: Workload
    store: Path
    modules: Sequence[str]
    sizes: Sizes

    @property
    def pattern(self) -> str:
        """For SQL; modules that are measured together share a parent of which nothing else is recorded."""
        return self.modules[0] if len(self.modules) == 1 else f"{self.parent}.*"

    @property
    def parent(self) -> str:
        """The module that all of them are parts of."""
        return os.path.commonpath([name.replace(".", "/") for name in self.modules]).replace("/", ".")


def record(workload: Workload, path: Path, modules: Sequence[str], sizes: Sizes) -> Path:
    """A store with the training samples first among the workload's, the query samples after them."""
    print(f"recording {len(workload.targets)} samples of {workload.name}", flush=True)
    splits = {"train": range(sizes.samples), "validation": range(sizes.samples, sizes.samples + sizes.queries)}
    workload.record(path, splits, [f"{name}.*" for name in modules])
    return path


class LaidOut:
    """Pre-compute: the gradients of a case in two files, and as many of the training samples as there is room for."""

    def __init__(self, case: Case, store: Store, folder: Path) -> None:
        self.layers = [store.layer(name) for name in case.modules]
        width = sum(layer.width for layer in self.layers)
        self.width = width
        self.rows = max(1, min(case.sizes.samples, int(case.sizes.file_bytes / (4 * width))))
        self.paths = [folder / "train.npy", folder / "validation.npy"]
        stretches = (range(self.rows), range(case.sizes.samples, case.sizes.samples + case.sizes.queries))
        for path, stretch in zip(self.paths, stretches, strict=True):
            write_gradients(path, store, self.layers, stretch)

    def best(self) -> Tensor:
        """The scores of each query sample's ten best, [queries, 10]."""
        # Copy on write: torch has no read-only tensors and would warn of them.
        train, query = (torch.from_numpy(np.load(path, mmap_mode="c")) for path in self.paths)
        return (query @ train.T).topk(min(10, len(train))).values


def write_gradients(path: Path, store: Store, layers: Sequence[Layer], rows: range) -> None:
    """Laid-out float32 gradients of these rows of a store, as ``numpy.save`` would write them."""
    width = sum(layer.width for layer in layers)
    file = np.lib.format.open_memmap(path, "w+", np.float32, (len(rows), width))
    for number, row in enumerate(rows):
        parts = [lay_out(layer, store.read(layer, np.array([row])))[0] for layer in layers]
        file[number] = torch.cat(parts).numpy()
    file.flush()


def forget(folder: Path) -> None:
    """Drops a folder's files from the system's cache, so that they are read from the disk the next time."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(report: Report, case: Case, section: str) -> None:
    """Adds the row of a case, after comparing its scores with those of torch.func's gradients."""
    sizes = case.sizes
    store = Store.open(case.store)
    factors = sum(layer_bytes(store, name) for name in case.modules) / (sizes.samples + sizes.queries)
    with tempfile.TemporaryDirectory() as folder:
        laid_out = LaidOut(case, store, Path(folder))
        store.close()
        times, scores = in_turns(case, laid_out)
        disk, pre_disk = from_disk(case, laid_out, Path(folder))
        if laid_out.rows == sizes.samples:
            require(_agree(scores, laid_out.best()), f"the ten best of {case.name} are not those of the full gradients")
    again = recomputed(case, laid_out.layers)
    of_pre, of_re = sizes.samples / laid_out.rows, (sizes.samples + sizes.queries) / sizes.recomputed
    cold, pre, re = median(times["cold"], "cpu"), median(times["pre"], "cpu") * of_pre, again.cpu * of_re
    report.add(
        section=section,
        layer=case.name,
        samples=sizes.samples,
        queries=sizes.queries,
        smaller=4 * laid_out.width / factors,
        connect=median(times["connect"]),
        cold=cold,
        cold_wall=median(times["cold"]),
        again=median(times["again"], "cpu"),
        pre=pre,
        pre_wall=median(times["pre"]) * of_pre,
        re=re,
        over_pre=pre / cold,
        over_re=re / cold,
        disk=disk,
        pre_disk=pre_disk * of_pre,
        measured=f"{laid_out.rows:,} and {sizes.recomputed:,} samples",
    )


def in_turns(case: Case, laid_out: LaidOut) -> tuple[dict[str, list[Seconds]], Tensor]:
    """Times by "connect", "cold", "again" and "pre", and the scores of each query sample's ten best."""
    times: dict[str, list[Seconds]] = {name: [] for name in ("connect", "cold", "again", "pre")}
    found: list[float] = []
    for number in range(case.sizes.rounds + 1):
        opened: list[metaql.Connection] = []
        one = {"connect": seconds(lambda: opened.append(connected(case.store)))}  # noqa: B023
        with opened[0] as db:

            def ask() -> None:
                found[:] = [score for _, score in db.sql(QUERY, [case.pattern]).fetchall()]

            one["cold"], one["again"] = seconds(ask), seconds(ask)
        one["pre"] = seconds(laid_out.best)
        # The first round warms up.
        for name, measured in one.items() if number else ():
            times[name].append(measured)
    return times, torch.tensor(found).reshape(case.sizes.queries, -1)


def connected(path: Path) -> metaql.Connection:
    """A connection that works on one thread, as its rivals do."""
    db = metaql.connect(path)
    db.sql("SET threads = 1")
    return db


def from_disk(case: Case, laid_out: LaidOut, folder: Path) -> tuple[float, float]:
    """Wall seconds of MetaQL and of Pre-compute when nothing is in the system's cache."""
    with connected(case.store) as db:
        forget(case.store)
        ours = seconds(lambda: db.sql(QUERY, [case.pattern]).fetchall()).wall
    forget(folder)
    return ours, seconds(laid_out.best).wall


def recomputed(case: Case, layers: Sequence[Layer]) -> Seconds:
    """Time of making some samples' gradients anew; ends the benchmark where their products are not MetaQL's scores."""
    names = [parameter.name for layer in layers for parameter in layer.parameters]
    count, few = case.sizes.recomputed, min(8, case.sizes.queries)
    made: list[Tensor] = []
    time = seconds(lambda: made.append(case.workload.gradients(range(count), names)))
    query = case.workload.gradients(range(case.sizes.samples, case.sizes.samples + few), names)
    with connected(case.store) as db:
        scores = [score for (score,) in db.sql(SOME, [case.pattern, count, few]).fetchall()]
    # In float64: a float32 product over half a million columns is off by up to a ten-thousandth itself.
    expected = made[0].double() @ query.double().T
    found = torch.tensor(scores).reshape(count, few)
    error = float((found - expected).abs().max() / expected.abs().max())
    require(error <= TOLERANCE, f"scores of {case.name} differ from torch.func's by {error:.1e} of the largest")
    return time


def _agree(found: Tensor, expected: Tensor) -> bool:
    return float((found - expected).abs().max()) <= ROUNDING * float(expected.abs().max())


def of_layers(
    report: Report, folder: Path, workload: Workload, layers: Mapping[str, Sequence[str]], sizes: Sizes
) -> None:
    """Figure 24: some layers of a network, each a name and its modules."""
    modules = list(dict.fromkeys(name for each in layers.values() for name in each))
    store = record(workload, folder / workload.name, modules, sizes)
    for name, each in layers.items():
        measure(report, Case(f"{workload.name} {name}", workload, store, each, sizes), "layers")


def layers_of_vgg(workload: Workload) -> dict[str, list[str]]:
    """Three convolutions and the classifier."""
    model = workload.model
    assert isinstance(model, VGG)
    return {f"conv{number}": [model.convolution(number)] for number in (1, 7, 13)} | {"linear1": ["classifier"]}


def layers_of_bert() -> dict[str, list[str]]:
    """The first layer's attention, its query alone, and the classifier."""
    return {"attention": attention(0), "query": attention(0)[:1], "linear1": ["classifier"]}


def of_linear(
    report: Report, folder: Path, widths: Sequence[int], samples: Sequence[int], queries: int, sizes: Sizes
) -> None:
    """Figures 25 and 26: one linear layer of several widths, or with several numbers of samples."""
    section = "widths" if len(widths) > 1 else "samples"
    for width in widths:
        for count in samples:
            of = Sizes(count, queries, sizes.recomputed, sizes.rounds, sizes.file_bytes)
            workload = linear(count + queries, width)
            store = record(workload, folder / f"{section}-{width}-{count}", ["0"], of)
            measure(report, Case(f"linear {width}x{width}", workload, store, ["0"], of), section)


def judge(report: Report) -> None:
    """The promises."""
    smaller = [row for row in report.rows if row["smaller"] > 1]
    slower = [
        f"{row['layer']}, {row['samples']:,} samples ({row['over_pre']:.2f}, again {row['pre'] / row['again']:.2f})"
        for row in smaller
        if min(row["over_pre"], row["over_re"]) < 1
    ]
    told = f"; not (times of Pre-compute) {', '.join(slower)}" if slower else ""
    report.promise(
        "faster than Pre-compute and Re-compute wherever the factors are smaller than the gradient (CPU time, files in"
        " the system's cache)",
        not slower,
        f"{len(smaller) - len(slower)} of {len(smaller)}{told}",
    )
    others = [row for row in report.rows if row["smaller"] <= 1]
    beyond = [max(0.0, row["cold"] - CONSTANT) / row["pre"] for row in others]
    report.promise(
        f"elsewhere at most {LIMIT} times Pre-compute and the {CONSTANT * 1e3:.0f} ms that any query may cost",
        all(each <= LIMIT for each in beyond),
        f"at most {max(beyond, default=0):.2f} times",
    )


def plot(report: Report) -> Any:
    """CPU time of each way, by layer, width and number of samples."""
    by: dict[str, Callable[[dict[str, Any]], Any]] = {
        "layers": lambda row: row["layer"],
        "widths": lambda row: int(row["layer"].rpartition("x")[2]),
        "samples": lambda row: row["samples"],
    }
    sections = {row["section"]: by[row["section"]] for row in report.rows}
    figure, axes = subplots(1, len(sections), figsize=(5 * len(sections), 4), squeeze=False)
    for axis, (section, place) in zip(axes[0], sections.items(), strict=True):
        rows = [row for row in report.rows if row["section"] == section]
        for key, label in (
            ("cold", "MetaQL"),
            ("again", "MetaQL, again"),
            ("pre", "Pre-compute"),
            ("re", "Re-compute"),
        ):
            style = "o" if section == "layers" else "o-"
            axis.plot([place(row) for row in rows], [row[key] for row in rows], style, label=label)
        axis.set_yscale("log")
        axis.set_xlabel(section)
        if section == "layers":
            axis.tick_params("x", rotation=60)
        else:
            axis.set_xscale("log", base=2)
    axes[0][0].set_ylabel("CPU seconds")
    # Over the plots: within them it would hide points.
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="lower center", bbox_to_anchor=(0.5, 0.95), ncols=4)
    return figure


def main() -> int:
    """Prints the table; 0 when scores agree and the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="BERT-base, 2,000 samples, widths to 2,048, larger files")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = Sizes(samples=2000, rounds=5, file_bytes=6e9) if options.full else Sizes()
    report = Report("p2p", "How long does it take to score every pair?")
    total = sizes.samples + sizes.queries
    widths = (64, 128, 256, 512, 1024, 2048) if options.full else (64, 256, 1024)
    with tempfile.TemporaryDirectory() as folder:
        texts = bert(total, 16, layers=12 if options.full else 2)
        images = vgg(total)
        of_layers(report, Path(folder), images, layers_of_vgg(images), sizes)
        of_layers(report, Path(folder), texts, layers_of_bert(), sizes)
        of_linear(report, Path(folder), widths, [2000], sizes.queries, sizes)
        of_linear(report, Path(folder), [512], [500, 1000, 2000, 4000, 8000], sizes.queries, sizes)
    judge(report)
    report.remark("The paper's MetaStore is 10 to 1,000 times faster than Pre-compute, 100 to 10^7 than Re-compute")
    report.remark("Times are of files in the system's cache, except the two from disk, measured once")
    report.remark(
        f"BERT has {12 if options.full else 2} layers here, which is what Re-compute runs; the layer that is scored has"
        " BERT-base's width and 16 positions. Re-compute makes all parameters' gradients that the layer has, bias too"
    )
    sections = [[row for row in report.rows if row["section"] == name] for name in ("layers", "widths", "samples")]
    return report.write([table(rows, COLUMNS) for rows in sections], plot(report))


if __name__ == "__main__":
    sys.exit(main())
