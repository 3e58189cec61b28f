"""How far is a query from what the machine could do?

Measures how fast torch reads and copies memory and multiplies matrices, on one thread and on all. Then some queries
over stores of random factors, fresh ones whose scores are not known from before: the time that reading their bytes, or
their multiplications at that rate, would take at least, and how many times above the larger of both they are. Queries
run on one thread and are compared with its rates, with files in the system's cache. Promises nothing.

    python -m bench.floor
    python -m bench.floor --full                 # more samples and rounds
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metaql
from bench.report import Report, bars, require, table
from bench.score_rows import SHAPES
from bench.stores import fill, linear
from bench.timing import interleaved, median, seconds
from metaql.storage.schema import Layer

P2B = """
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS score FROM train t, validation v
WHERE v.sample_id <> ? GROUP BY t.sample_id ORDER BY score DESC LIMIT 10
"""
P2P = """
SELECT v.sample_id, t.sample_id, inner_product(t.gradient, v.gradient) AS score FROM train t, validation v
WHERE v.sample_id <> ? QUALIFY row_number() OVER (PARTITION BY v.sample_id ORDER BY score DESC) <= 10
"""
RATES = {"threads": "threads", "read": "reading, GB/s", "copy": "copying, GB/s", "products": "products, GFLOP/s"}
COLUMNS = {
    "query": "query",
    "layers": "layers",
    "samples": "samples",
    "megabytes": "MB read",
    "gflop": "GFLOP",
    "reading": "reading, ms",
    "multiplying": "multiplying, ms",
    "wall": "query, wall ms",
    "cpu": "CPU ms",
    "above": "times the larger, wall",
    "above_cpu": "CPU",
}


@dataclass(frozen=True)
class Rates:
    """Bytes and floating point operations a second; copying counts what is read and what is written."""

    read: float
    copy: float
    products: float


def rates(threads: int, megabytes: int = 512, size: int = 2048, rounds: int = 7) -> Rates:
    """The best of some rounds."""
    torch.set_num_threads(threads)
    values = torch.ones(megabytes << 18)
    other, matrix = torch.empty_like(values), torch.randn(size, size)
    calls: dict[str, Callable[[], object]] = {
        "read": values.sum,
        "copy": lambda: other.copy_(values),
        "products": lambda: torch.mm(matrix, matrix),
    }
    best = {name: min(seconds(call).wall for _ in range(rounds)) for name, call in calls.items()}
    size_in_bytes = 4 * values.numel()
    return Rates(size_in_bytes / best["read"], 2 * size_in_bytes / best["copy"], 2 * size**3 / best["products"])


def least(layers: list[Layer], samples: int, queries: int, every_pair: bool) -> tuple[float, float]:
    """Bytes that have to be read, and floating point operations of the cheapest way over these factors."""
    read = flops = 0.0
    for layer in layers:
        inside, outside, positions = layer.input_width or 0, layer.output_width or 0, layer.positions or 1
        read += 4 * (samples + queries) * positions * (inside + outside)
        laid_out = 2.0 * positions * inside * outside
        if every_pair:
            pair = min(2 * positions**2 * (inside + outside), 2 * inside * outside)
            flops += samples * queries * pair
        else:
            # The query side's average is laid out, or stays in factors where these are fewer.
            by_factors = 2.0 * positions**2 * queries * (inside + outside)
            flops += queries * laid_out + samples * min(laid_out, by_factors)
    return read, flops


def measure(
    report: Report, name: str, shapes: list[tuple[int, int, int]], sizes: tuple[int, int], rounds: int, machine: Rates
) -> None:
    """Adds the row of one query; its name begins with P2B or P2P."""
    (samples, queries), every_pair = sizes, name.startswith("P2P")
    layers = [linear(f"fc{number}", *shape) for number, shape in enumerate(shapes)]
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder) / "store", layers, {"train": samples, "validation": queries})
        with metaql.connect(Path(folder) / "store") as db:
            db.sql("SET threads = 1")
            left_out = itertools.count()

            def ask() -> None:
                rows = db.sql(P2P if every_pair else P2B, [next(left_out)]).fetchall()
                require(len(rows) == 10 * (queries - 1 if every_pair else 1), f"{name} has {len(rows)} rows")

            times = interleaved({"ask": ask}, rounds)["ask"]
    read, flops = least(layers, samples, queries, every_pair)
    reading, multiplying = read / machine.read, flops / machine.products
    report.add(
        query=name,
        layers=" and ".join(f"{inside}x{outside}, {positions} pos." for inside, outside, positions in shapes),
        samples=f"{samples:,} x {queries:,}",
        megabytes=read / 1e6,
        gflop=flops / 1e9,
        reading=reading * 1e3,
        multiplying=multiplying * 1e3,
        wall=median(times) * 1e3,
        cpu=median(times, "cpu") * 1e3,
        above=median(times) / max(reading, multiplying),
        above_cpu=median(times, "cpu") / max(reading, multiplying),
    )


def plot(report: Report) -> Any:
    """What reading and multiplying would take beside what the query takes."""
    keys = {"reading": "reading alone", "multiplying": "multiplying alone", "cpu": "query, CPU"}
    return bars(report.rows, "query", keys, "ms")[0]


def main() -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="50,000 samples, 21 rounds")
    options = parser.parse_args()
    torch.manual_seed(0)
    samples, rounds = (50_000, 21) if options.full else (20_000, 7)
    report = Report("floor", "How far is a query from what the machine could do?")
    found = []
    for threads in sorted({os.cpu_count() or 1, 1}, reverse=True):
        machine = rates(threads)
        values = {"read": machine.read / 1e9, "copy": machine.copy / 1e9, "products": machine.products / 1e9}
        found.append({"threads": threads, **values})
        print(found[-1], flush=True)
    for name, shapes in SHAPES.items():
        measure(report, f"P2B {name}", shapes, (samples, 256), rounds, machine)
    for name in ("128x128", "512x10", "16 positions"):
        pairs = (samples // 10, 100) if SHAPES[name][0][2] > 1 else (samples, 200)
        measure(report, f"P2P {name}", SHAPES[name], pairs, rounds, machine)
    report.remark(
        "A query costs about 10 ms before any gradient is read (bench/README.md), which is most of what stands above"
        " the floor of the small ones"
    )
    return report.write([table(found, RATES), table(report.rows, COLUMNS)], plot(report))


if __name__ == "__main__":
    sys.exit(main())
