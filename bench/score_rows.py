"""What does SQL add to scoring rows that lie in a store?

50,000 stored rows of a 128x128 linear layer against one query-side gradient, ``ORDER BY … LIMIT 10``, through SQL;
beside the same einsum in torch on tensors already in memory. Both run on one thread, in turns, and what counts is
the median of the ratios of their CPU times. Exits with 1 when the results differ or the ratio exceeds the limit.

    python bench/score_rows.py                   # the shape above
    python bench/score_rows.py --rows 20000 --output 1024 --input 1024
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import duckdb
import numpy as np
import torch

import metaql
from metaql.storage.blocks import Factored
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.storage.writer import Writer

QUERY = """
SELECT t.sample_id, inner_product(t.gradient, (SELECT avg(v.gradient) FROM validation v)) AS score
FROM train t ORDER BY score DESC LIMIT 10
"""
LIMIT = 1.5


def record(path: Path, layer: Layer, factors: dict[str, Factored]) -> None:
    """A store with one collection for each split."""
    with Writer.open(path) as writer:
        writer.define("bench", (layer,), "float32")
        checkpoint = writer.add_checkpoint({"weight": torch.ones(1)}, "bench", None, {})
        for split, block in factors.items():
            collection = writer.collection(split, checkpoint)
            for begin in range(0, block.samples, 1024):
                rows = slice(begin, min(begin + 1024, block.samples))
                part = Factored(block.suffix[rows].clone(), block.prefix[rows].clone(), rows.stop - rows.start)
                ids = np.arange(rows.start, rows.stop)
                collection.append(ids, {layer.name: part}, np.zeros(part.samples))
            collection.finish()


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call, of all threads."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def main() -> int:
    """Prints the figures; 0 when they are within the limit and the results agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--input", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, o, i = options.rows, options.output, options.input
    layer = Layer("fc", "linear", (Parameter("fc.weight", (o, i)),), FACTORED, "float32", 1, i, o, 1)
    train, validation = (Factored(torch.randn(n, i), torch.randn(n, o), n) for n in (rows, 256))
    gradient = torch.einsum("no,ni->oi", validation.prefix, validation.suffix) / 256

    def in_torch() -> list[int]:
        scores = torch.einsum("ni,oi,no->n", train.suffix, gradient, train.prefix)
        return scores.topk(10).indices.tolist()

    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder) / "store", layer, {"train": train, "validation": validation})
        with metaql.connect(Path(folder) / "store") as db:
            # Spread over threads torch would have an unfair rival; one thread also gives steadier times.
            db.sql("SET threads = 1")

            def in_sql() -> list[int]:
                return [sample for sample, _ in db.sql(QUERY).fetchall()]

            same = in_sql() == in_torch()
            pairs = [(cpu_seconds(in_sql), cpu_seconds(in_torch)) for _ in range(options.rounds)]
    ratio = statistics.median(sql / plain for sql, plain in pairs)
    medians = [statistics.median(times) * 1e3 for times in zip(*pairs, strict=True)]
    print(f"{datetime.now(UTC):%Y-%m-%d}  {processor()}, {os.cpu_count()} cores, 1 thread used")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, duckdb {duckdb.__version__}")
    print(f"{rows:,} rows of a {o}x{i} linear layer, {options.rounds} rounds, CPU time")
    print(f"SQL {medians[0]:.1f} ms   torch {medians[1]:.1f} ms   median of ratios {ratio:.2f} (limit {LIMIT})")
    if not same:
        print("the results differ", file=sys.stderr)
    return 0 if same and ratio <= LIMIT else 1


def processor() -> str:
    """The processor's name as the system gives it."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
