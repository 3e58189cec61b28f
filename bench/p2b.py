"""How long does it take to score samples against a batch of query samples?

Figure 27 of the MetaStore paper beside ours. The ten best training samples of one linear layer by their average inner
product with 1 to 1,024 query samples: in SQL, and as plain torch on the same mapped files, record batch by record
batch, in three ways that give the same scores. Iterate multiplies each query sample's factors with each sample's, and
averages; Reconstruct lays the query side's average out once and contracts the factors with it, by the faster of two
formulas; Full lays out both sides. Each round asks for other query samples, so that nothing is known from before. One
thread, in turns, CPU time. Exits with 1 when scores differ or a promise is missed.

    python -m bench.p2b
    python -m bench.p2b --full                   # more samples, more batches
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

import metaql
from bench.report import Report, require, subplots, table
from bench.stores import fill, linear, mapped
from bench.timing import interleaved, median, median_ratio
from metaql.storage.store import Store

QUERY = """
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS score FROM train t, validation v
WHERE v.sample_id BETWEEN ? AND ? GROUP BY t.sample_id ORDER BY score DESC LIMIT 10
"""
WIDTH = 256
# What a query costs before any gradient is read (bench/README.md), with room; and what it may cost besides.
CONSTANT, LIMIT, TOLERANCE = 0.015, 1.3, 1e-4
# Multiplications that Iterate, and numbers that Full may take in a round; beyond them fewer samples are measured, and
# their time is multiplied.
MOST, MOST_LAID_OUT = 2e10, 1 << 27
# Numbers of laid-out gradients, or of products, at a time: they stay in the processor's caches.
STEP = 1 << 19
COLUMNS = {
    "positions": "positions",
    "samples": "samples",
    "queries": "query samples",
    "sql": "MetaQL, ms",
    "again": "asked again, ms",
    "iterate": "Iterate, ms",
    "reconstruct": "Reconstruct, ms",
    "full": "Full, ms",
    "over_best": "MetaQL / best of the three",
    "over_iterate": "Iterate / MetaQL",
    "over_reconstruct": "Reconstruct / MetaQL",
    "measured": "Iterate, Full measured on",
}


@dataclass(frozen=True)
class Sides:
    """The mapped store: training samples in record batches, query samples in one."""

    train: Sequence[tuple[Tensor, Tensor]]
    query: tuple[Tensor, Tensor]

    def some(self, samples: int) -> Sides:
        """The first of the training samples."""
        suffix, prefix = self.train[0]
        return Sides([(suffix[:samples], prefix[:samples])], self.query)

    def window(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Suffixes and prefixes of all positions of some query samples, [p, i] and [p, o]."""
        suffix, prefix = (values[first : first + count].flatten(0, 1) for values in self.query)
        return suffix, prefix


def iterate(sides: Sides, first: int, count: int) -> Tensor:
    """The sums over s and t of (a_s·a'_t)(b_s·b'_t), averaged: factors with factors."""
    suffix, prefix = sides.window(first, count)
    scores = [
        ((b.flatten(0, 1) @ prefix.T).mul_(a.flatten(0, 1) @ suffix.T)).sum(1).reshape(len(a), -1).sum(1)
        for a, b in pieces(sides.train, len(suffix))
    ]
    return torch.cat(scores) / count


def pieces(batches: Sequence[tuple[Tensor, Tensor]], numbers: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Some samples at a time, by the numbers that a position's intermediate result has."""
    for suffix, prefix in batches:
        each = max(1, STEP // (numbers * suffix.shape[1]))
        yield from zip(suffix.split(each), prefix.split(each), strict=True)


def by_prefix(sides: Sides, first: int, count: int) -> Tensor:
    """b_sᵀ G first."""
    gradient = averaged(sides, first, count)
    return torch.cat([(b @ gradient).mul_(a).sum((1, 2)) for a, b in pieces(sides.train, WIDTH)])


def by_suffix(sides: Sides, first: int, count: int) -> Tensor:
    """G a_s first."""
    gradient = averaged(sides, first, count)
    return torch.cat([(a @ gradient.T).mul_(b).sum((1, 2)) for a, b in pieces(sides.train, WIDTH)])


def averaged(sides: Sides, first: int, count: int) -> Tensor:
    """The query samples' average gradient, laid out."""
    suffix, prefix = sides.window(first, count)
    return prefix.T @ suffix / count


def full(sides: Sides, first: int, count: int) -> Tensor:
    """Both sides laid out."""
    gradient = averaged(sides, first, count).flatten()
    return torch.cat([(b.mT @ a).flatten(1) @ gradient for a, b in pieces(sides.train, WIDTH * WIDTH)])


def measure(report: Report, positions: int, samples: int, batches: Sequence[int], rounds: int) -> None:
    """Adds the rows of layers with so many positions."""
    with tempfile.TemporaryDirectory() as folder:
        path, most = Path(folder) / "store", max(batches) + 4 * (rounds + 1)
        print(f"writing {samples:,} samples of {positions} positions", flush=True)
        fill(path, [linear("fc", WIDTH, WIDTH, positions)], {"train": samples, "validation": most})
        store = Store.open(path)
        query = list(mapped(store, store.layers[0], samples, samples + most))
        together = tuple(torch.cat(each) for each in zip(*query, strict=True))
        sides = Sides(list(mapped(store, store.layers[0], 0, samples)), together)
        with metaql.connect(path) as db:
            db.sql("SET threads = 1")
            for count in batches:
                compare(report, db, sides, samples, count, rounds)


def compare(report: Report, db: metaql.Connection, sides: Sides, samples: int, count: int, rounds: int) -> None:
    """Adds the row of one batch size."""
    positions = sides.query[0].shape[1]
    each = count * positions**2 * 2 * WIDTH
    fewer = max(1, min(samples, int(MOST / each), len(sides.train[0][0]) if samples * each > MOST else samples))
    some = sides if fewer == samples else sides.some(fewer)
    laid_out = min(samples, MOST_LAID_OUT // WIDTH**2, len(sides.train[0][0]))
    few = sides.some(laid_out)
    contracted = faster(sides, count)

    def ask(first: int) -> list[float]:
        return [score for _, score in db.sql(QUERY, [first, first + count - 1]).fetchall()]

    require(_agree(ask(0), contracted(sides, 0, count).topk(10).values), "scores of SQL and Reconstruct differ")
    require(_agree(iterate(some, 0, count).tolist(), contracted(some, 0, count)), "scores of Iterate differ")
    require(_agree(full(few, 0, count).tolist(), contracted(few, 0, count)), "scores of Full differ")
    # A new window each time: the query has not been asked before.
    firsts, last = itertools.count(1), [0]

    def fresh() -> None:
        last[0] = next(firsts)
        ask(last[0])

    ways: dict[str, Callable[[], object]] = {
        "sql": fresh,
        "again": lambda: ask(last[0]),
        "iterate": lambda: iterate(some, last[0], count).topk(min(10, fewer)),
        "reconstruct": lambda: contracted(sides, last[0], count).topk(10),
        "full": lambda: full(few, last[0], count).topk(min(10, laid_out)),
    }
    times = interleaved(ways, rounds)
    milliseconds = {name: median(each, "cpu") * 1e3 for name, each in times.items()}
    milliseconds["iterate"] *= samples / fewer
    milliseconds["full"] *= samples / laid_out
    best = min(milliseconds[name] for name in ("iterate", "reconstruct", "full"))
    report.add(
        positions=positions,
        samples=samples,
        queries=count,
        **milliseconds,
        over_best=milliseconds["sql"] / best,
        over_iterate=milliseconds["iterate"] / milliseconds["sql"],
        over_reconstruct=1 / median_ratio(times["sql"], times["reconstruct"], "cpu"),
        best=best,
        measured=f"{fewer:,} and {laid_out:,} samples",
    )


def faster(sides: Sides, count: int) -> Callable[[Sides, int, int], Tensor]:
    """The better formula of Reconstruct on this machine."""
    times = interleaved({each.__name__: lambda e=each: e(sides, 0, count) for each in (by_prefix, by_suffix)}, 3)  # type: ignore[misc]
    return by_prefix if median(times["by_prefix"], "cpu") <= median(times["by_suffix"], "cpu") else by_suffix


def _agree(found: Sequence[float], expected: Tensor) -> bool:
    return float((torch.tensor(found) - expected).abs().max()) <= TOLERANCE * float(expected.abs().max())


def judge(report: Report) -> None:
    """The promise."""
    beyond = {
        f"{row['positions']} positions, {row['queries']:,} query samples": (row["sql"] - CONSTANT * 1e3) / row["best"]
        for row in report.rows
    }
    worst = max(beyond, key=lambda name: beyond[name])
    report.promise(
        f"at most {LIMIT} times the best of Iterate, Reconstruct and Full at every size, and the"
        f" {CONSTANT * 1e3:.0f} ms that any query may cost (CPU time)",
        beyond[worst] <= LIMIT,
        f"at most {max(0.0, beyond[worst]):.2f} times, at {worst}",
    )


def plot(report: Report) -> Any:
    """CPU time by batch size, a panel for each number of positions."""
    kinds = sorted({row["positions"] for row in report.rows})
    figure, axes = subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False)
    names = {
        "sql": "MetaQL",
        "again": "MetaQL, again",
        "iterate": "Iterate",
        "reconstruct": "Reconstruct",
        "full": "Full",
    }
    for axis, positions in zip(axes[0], kinds, strict=True):
        rows = [row for row in report.rows if row["positions"] == positions]
        for key, label in names.items():
            axis.loglog([row["queries"] for row in rows], [row[key] for row in rows], "o-", label=label)
        axis.set_title(f"{positions} positions, {rows[0]['samples']:,} samples")
        axis.set_xlabel("query samples")
    axes[0][0].set_ylabel("CPU ms")
    axes[0][0].legend()
    return figure


def main() -> int:
    """Prints the table; 0 when scores agree and the promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="ten times the samples, every power of two, more rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report("p2b", "How long does it take to score samples against a batch of query samples?")
    batches = [2**k for k in range(11)] if options.full else [1, 4, 16, 64, 256, 1024]
    for positions in (1, 16, 64):
        samples = (320_000 if options.full else 32_000) // positions
        measure(report, positions, samples, batches, 9 if options.full else 5)
    judge(report)
    report.remark("The paper's P2B is 2 to 10 times faster than iterating over the query samples")
    report.remark(
        f"One linear layer of {WIDTH}x{WIDTH}; where Iterate would take long, its time is multiplied in proportion"
    )
    return report.write([table(report.rows, COLUMNS)], plot(report))


if __name__ == "__main__":
    sys.exit(main())
