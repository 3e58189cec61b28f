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
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import duckdb
import numpy as np
import torch
from torch import Tensor

import metaql
from bench.report import processor
from metaql.storage.blocks import Factored
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.storage.store import Store
from metaql.storage.writer import Writer

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

    def all(self) -> tuple[Tensor, Tensor]:
        """All rows."""
        suffixes, prefixes = zip(*self.batches, strict=True)
        return torch.cat(suffixes), torch.cat(prefixes)


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


def record(path: Path, layers: list[Layer]) -> None:
    """A store with a collection of random gradients for each split."""
    with Writer.open(path) as writer:
        writer.define("bench", tuple(layers), "float32")
        checkpoint = writer.add_checkpoint({"weight": torch.ones(1)}, "bench", None, {})
        for split, rows in (("train", ROWS), ("validation", QUERY_ROWS)):
            collection = writer.collection(split, checkpoint)
            for begin in range(0, rows, 1024):
                count = min(1024, rows - begin)
                blocks = {layer.name: random_factors(layer, count) for layer in layers}
                collection.append(np.arange(begin, begin + count), blocks, np.zeros(count))
            collection.finish()


def random_factors(layer: Layer, samples: int) -> Factored:
    """Of normally distributed numbers."""
    positions = samples * (layer.positions or 1)
    suffix = torch.randn(positions, layer.groups * (layer.input_width or 0))
    return Factored(suffix, torch.randn(positions, layer.output_width or 0), samples)


def mapped(store: Store, layers: list[Layer], first: int, rows: int) -> list[Segment]:
    """Each layer's record batches of some rows."""
    return [Segment(list(batches(store, layer, first, first + rows))) for layer in layers]


def batches(store: Store, layer: Layer, begin: int, end: int) -> list[tuple[Tensor, Tensor]]:
    """Views of the mapped file."""
    found = []
    while begin < end:
        count = min(store.together(layer, begin), end - begin)
        block = store.read(layer, np.arange(begin, begin + count))
        assert isinstance(block, Factored)
        found.append((block.suffix.unflatten(0, (count, -1)), block.prefix.unflatten(0, (count, -1))))
        begin += count
    return found


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call, of all threads."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def measure(name: str, rounds: int) -> bool:
    """Prints a shape's figures; whether the promise is kept and the results agree."""
    layers = [
        Layer(f"fc{k}", "linear", (Parameter(f"fc{k}.weight", (o, i)),), FACTORED, "float32", 1, i, o, positions)
        for k, (i, o, positions) in enumerate(SHAPES[name])
    ]
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder) / "store", layers)
        store = Store.open(Path(folder) / "store")
        train, query = mapped(store, layers, 0, ROWS), mapped(store, layers, ROWS, QUERY_ROWS)
        with metaql.connect(Path(folder) / "store") as db:
            # Spread over threads torch would have an unfair rival; one thread also gives steadier times.
            db.sql("SET threads = 1")

            def in_sql(without: int) -> list[int]:
                return [sample for sample, _ in db.sql(QUERY, [without]).fetchall()]

            left_out = itertools.count()
            ways = (by_prefix, by_suffix, by_einsum)
            trials = {way: [cpu_seconds(lambda w=way: in_torch(train, query, -1, w)) for _ in range(5)] for way in ways}
            best = min(trials, key=lambda way: statistics.median(trials[way]))
            without = next(left_out)
            same = in_sql(without) == in_torch(train, query, without, best)
            times = []
            for without in itertools.islice(left_out, rounds):
                sql = cpu_seconds(lambda: in_sql(without))  # noqa: B023
                again = cpu_seconds(lambda: in_sql(without))  # noqa: B023
                times.append((sql, cpu_seconds(lambda: in_torch(train, query, without, best)), again))  # noqa: B023
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
