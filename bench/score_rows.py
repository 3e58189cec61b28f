"""What does SQL add to scoring rows that lie in a store?

The ten best of 50,000 stored rows by their inner product with the query side's average gradient: in SQL, and as a
skilled user would write it in torch, on the same files mapped into memory, record batch by record batch, in whichever
of three formulations is the fastest for the shape. Every round leaves out another sample of the query side, by a
parameter, so that both average anew and no score is known from before; what the same query costs when it is asked
again is printed besides. Both run on one thread, in turns, and what counts is the median of the ratios of their CPU
times. Exits with 1 when results differ or a ratio exceeds the limit.

    python -m bench.score_rows                   # all shapes
    python -m bench.score_rows --shape 512x10 --rounds 51
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import duckdb
import torch
from torch import Tensor

import metaql
from bench.report import processor
from bench.stores import fill, linear, mapped
from bench.timing import seconds
from metaql.storage.store import Store

QUERY = """
SELECT t.sample_id, inner_product(t.gradient, (SELECT avg(v.gradient) FROM validation v WHERE v.sample_id <> ?))
  AS score
FROM train t ORDER BY score DESC LIMIT 10
"""
LIMIT = 1.3
ROWS, QUERY_ROWS = 50_000, 256
# By name: (input width, output width, positions) of each layer.
SHAPES = {
    "128x128": [(128, 128, 1)],
    "512x10": [(512, 10, 1)],
    "64x64": [(64, 64, 1)],
    "1024x1024": [(1024, 1024, 1)],
    "four layers": [(128, 128, 1), (128, 128, 1), (128, 64, 1), (64, 10, 1)],
    "16 positions": [(64, 64, 16)],
}


@dataclass(frozen=True)
class Segment:
    """A layer's record batches as tensors: (suffixes [n, s, i], prefixes [n, s, o])."""

    batches: list[tuple[Tensor, Tensor]]


def by_prefix(suffix: Tensor, prefix: Tensor, gradient: Tensor) -> Tensor:
    """b_sᵀ G first."""
    return (prefix @ gradient).mul_(suffix).sum((1, 2))


def by_suffix(suffix: Tensor, prefix: Tensor, gradient: Tensor) -> Tensor:
    """G a_s first."""
    return (suffix @ gradient.T).mul_(prefix).sum((1, 2))


def by_einsum(suffix: Tensor, prefix: Tensor, gradient: Tensor) -> Tensor:
    """torch decides."""
    return torch.einsum("nsi,oi,nso->n", suffix, gradient, prefix)


def in_torch(train: list[Segment], query: list[Segment], without: int, score: Callable[..., Tensor]) -> list[int]:
    """The ten best rows, by hand."""
    total: Tensor | None = None
    keep = torch.arange(QUERY_ROWS) != without
    for segment, side in zip(train, query, strict=True):
        suffix, prefix = (values[keep].flatten(0, 1) for values in side.batches[0])
        gradient = prefix.T @ suffix / (QUERY_ROWS - 1)
        scores = torch.cat([score(*batch, gradient) for batch in segment.batches])
        total = scores if total is None else total + scores
    assert total is not None
    return total.topk(10).indices.tolist()


def segments(store: Store, begin: int, end: int) -> list[Segment]:
    """Each layer's record batches of some rows."""
    return [Segment(list(mapped(store, layer, begin, end))) for layer in store.layers]


def measure(name: str, rounds: int) -> bool:
    """Prints a shape's figures; whether the promise is kept and the results agree."""
    layers = [linear(f"fc{number}", *shape) for number, shape in enumerate(SHAPES[name])]
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder) / "store", layers, {"train": ROWS, "validation": QUERY_ROWS})
        store = Store.open(Path(folder) / "store")
        train, query = segments(store, 0, ROWS), segments(store, ROWS, ROWS + QUERY_ROWS)
        with metaql.connect(Path(folder) / "store") as db:
            # Spread over threads torch would have an unfair rival; one thread also gives steadier times.
            db.sql("SET threads = 1")

            def in_sql(without: int) -> list[int]:
                return [sample for sample, _ in db.sql(QUERY, [without]).fetchall()]

            left_out = itertools.count()
            ways = (by_prefix, by_suffix, by_einsum)
            trials = {way: [seconds(lambda w=way: in_torch(train, query, -1, w)).cpu for _ in range(5)] for way in ways}
            best = min(trials, key=lambda way: statistics.median(trials[way]))
            without = next(left_out)
            same = in_sql(without) == in_torch(train, query, without, best)
            times = []
            for without in itertools.islice(left_out, rounds):
                sql = seconds(lambda: in_sql(without)).cpu  # noqa: B023
                again = seconds(lambda: in_sql(without)).cpu  # noqa: B023
                times.append((sql, seconds(lambda: in_torch(train, query, without, best)).cpu, again))  # noqa: B023
    ratios = [sql / rival for sql, rival, _ in times]
    sql, rival, again = (statistics.median(column) * 1e3 for column in zip(*times, strict=True))
    ratio = statistics.median(ratios)
    low, _, high = statistics.quantiles(ratios, n=4)
    print(
        f"{name:<13} SQL {sql:7.1f} ms   torch {rival:7.1f} ms ({best.__name__})   ratio {ratio:.2f}"
        f" (quartiles {low:.2f} to {high:.2f})   asked again {again:.1f} ms{'' if same else '   RESULTS DIFFER'}",
        flush=True,
    )
    return same and ratio <= LIMIT


def main() -> int:
    """Prints the figures; 0 when they are within the limit and the results agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="one of the shapes; all by default")
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{datetime.now(UTC):%Y-%m-%d}  {processor()}, {os.cpu_count()} cores, 1 thread used")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, duckdb {duckdb.__version__}")
    print(f"{ROWS:,} rows, {options.rounds} rounds, CPU time, limit {LIMIT}")
    kept = [measure(name, options.rounds) for name in options.shape or SHAPES]
    return 0 if all(kept) else 1


if __name__ == "__main__":
    sys.exit(main())
