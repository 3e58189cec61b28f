"""How do a query's time and a store's size grow with samples, layers and checkpoints?

Stores of random factors of linear layers. The query is the ten best samples by their influence on a split's average,
summed over checkpoints with their learning rates where there are several; every round leaves out another query sample,
so that nothing is known from before, and asks once more. Slopes are those of lines through the logarithms: 1 is
proportional. What the same query takes on a hundred rows is subtracted from its times first. One thread, CPU time.
Exits with 1 when a promise is missed.

    python -m bench.growth
    python -m bench.growth --full                # to a million samples
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

import metaql
from bench.report import Report, require, subplots, table
from bench.stores import fill, linear
from bench.timing import interleaved, median
from metaql.storage.info import info

QUERY = """
SELECT t.sample_id, avg(inner_product(t.gradient, v.gradient)) AS score FROM train t, validation v
WHERE v.sample_id <> ? GROUP BY t.sample_id ORDER BY score DESC LIMIT 10
"""
OVER_CHECKPOINTS = """
WITH query AS (
  SELECT checkpoint, avg(gradient) AS mean FROM gradients WHERE split = 'validation' AND sample_id <> ?
  GROUP BY checkpoint)
SELECT g.sample_id, sum(c.learning_rate * inner_product(g.gradient, q.mean)) AS score
FROM gradients g JOIN query q USING (checkpoint) JOIN checkpoints c USING (checkpoint)
WHERE g.split = 'train' GROUP BY g.sample_id ORDER BY score DESC LIMIT 10
"""
INSIDE, OUTSIDE, QUERY_ROWS, FEW = 64, 32, 64, 100
BYTES_LIMIT, TIME_LIMIT = 1.05, 1.1
COLUMNS = {
    "samples": "samples",
    "layers": "layers",
    "checkpoints": "checkpoints",
    "bytes": "bytes",
    "fresh": "query, CPU ms",
    "again": "again, CPU ms",
    "constant": "of which constant",
}


def measure(report: Report, section: str, samples: int, layers: int, checkpoints: int, rounds: int) -> None:
    """Adds the row of one store."""
    constant, _, _ = times_of(FEW, layers, checkpoints, rounds)
    fresh, again, size = times_of(samples, layers, checkpoints, rounds)
    report.add(
        section=section,
        samples=samples,
        layers=layers,
        checkpoints=checkpoints,
        bytes=size,
        fresh=fresh,
        again=again,
        constant=constant,
    )


def times_of(samples: int, layers: int, checkpoints: int, rounds: int) -> tuple[float, float, int]:
    """CPU milliseconds of a query that was not asked before, and asked again; the store's bytes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        parts = [linear(f"fc{number}", INSIDE, OUTSIDE) for number in range(layers)]
        fill(path, parts, {"train": samples, "validation": QUERY_ROWS}, checkpoints)
        text = QUERY if checkpoints == 1 else OVER_CHECKPOINTS
        left_out, last = itertools.count(), [0]
        with metaql.connect(path) as db:
            db.sql("SET threads = 1")

            def fresh() -> None:
                last[0] = next(left_out)
                require(len(db.sql(text, [last[0]]).fetchall()) == 10, "there are not ten best samples")

            ways = {"fresh": fresh, "again": lambda: db.sql(text, [last[0]]).fetchall()}
            times = interleaved(ways, rounds)
        return *(median(times[name], "cpu") * 1e3 for name in ways), info(path).bytes


def slopes(rows: Sequence[dict[str, Any]], key: str) -> dict[str, float | None]:
    """The growth of bytes and of times beyond the constant, with what ``key`` names."""
    return {
        "bytes": slope([(row[key], row["bytes"]) for row in rows]),
        "fresh": slope([(row[key], beyond(row, "fresh")) for row in rows if beyond(row, "fresh") > 0]),
        "again": slope([(row[key], beyond(row, "again")) for row in rows if beyond(row, "again") > 0]),
    }


def beyond(row: dict[str, Any], name: str) -> float:
    """Time beyond the constant; 0 where it is too little of the whole to tell."""
    more: float = row[name] - row["constant"]
    return more if more >= 0.5 * row["constant"] else 0.0


def slope(points: Sequence[tuple[float, float]]) -> float | None:
    """Of the line through the points' logarithms; None of less than three points."""
    if len(points) < 3:
        return None
    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def judge(report: Report) -> list[dict[str, Any]]:
    """The promises, which are about samples; returns the slopes as rows."""
    found = []
    for key in ("samples", "layers", "checkpoints"):
        rows = [row for row in report.rows if row["section"] == key]
        found.append({"with": key, **slopes(rows, key)})
    of_bytes, of_time = found[0]["bytes"], found[0]["fresh"]
    report.promise(
        f"bytes grow with a slope of at most {BYTES_LIMIT} in samples",
        of_bytes is not None and of_bytes <= BYTES_LIMIT,
        "too few points" if of_bytes is None else f"{of_bytes:.3f}",
    )
    report.promise(
        f"a query's time beyond its constant grows with a slope of at most {TIME_LIMIT} in samples",
        of_time is not None and of_time <= TIME_LIMIT,
        "too few points" if of_time is None else f"{of_time:.3f}",
    )
    return found


def plot(report: Report) -> Any:
    """Time and bytes by samples, layers and checkpoints."""
    figure, axes = subplots(1, 3, figsize=(15, 4))
    for axis, key in zip(axes, ("samples", "layers", "checkpoints"), strict=True):
        rows = [row for row in report.rows if row["section"] == key]
        for name, label in (("fresh", "query, CPU ms"), ("again", "again, CPU ms")):
            axis.loglog([row[key] for row in rows], [row[name] for row in rows], "o-", label=label)
        axis.loglog([row[key] for row in rows], [row["bytes"] / 1e6 for row in rows], "s--", label="MB")
        axis.set_xlabel(key)
    axes[0].legend()
    return figure


def main() -> int:
    """Prints the tables; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="to a million samples, 64 layers and 32 checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report = Report("growth", "How do a query's time and a store's size grow?")
    rounds = 9 if options.full else 5
    most = 1_000_000 if options.full else 200_000
    for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1):
        measure(report, "samples", int(most * share), 1, 1, rounds)
    for layers in (1, 2, 4, 8, 16, 32, 64)[: 7 if options.full else 5]:
        measure(report, "layers", 10_000, layers, 1, rounds)
    for checkpoints in (2, 4, 8, 16, 32)[: 5 if options.full else 4]:
        measure(report, "checkpoints", 10_000, 1, checkpoints, rounds)
    found = judge(report)
    report.remark(
        f"Layers of {INSIDE}x{OUTSIDE}. No slope of time stands where what is beyond the constant is less than half"
        " of it at most points"
    )
    headings = {"with": "slope with", "bytes": "bytes", "fresh": "query", "again": "again"}
    return report.write([table(report.rows, COLUMNS), table(found, headings)], plot(report))


if __name__ == "__main__":
    sys.exit(main())
