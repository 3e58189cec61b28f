"""What does SQL add to finding each query sample's ten best among all pairs, and how much memory does it take?

100,000 x 1,000 samples of a 128x128 linear layer, through SQL; beside tiles of torch's products with topk, on the
store's mapped files. One thread each, CPU time, in turns. Exits with 1 when the pairs differ, or SQL takes more than
2 GB of anonymous memory or more than the limit's times torch's time. Linux only.

    python -m bench.pairs
    python -m bench.pairs --rows 20000 --queries 500
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import duckdb
import numpy as np
import torch

import metaql
from bench.stores import fill, linear
from metaql.storage.store import Store

WIDTH, TILE = 128, 4096
QUERY = """
SELECT v.sample_id, t.sample_id, inner_product(t.gradient, v.gradient) AS s FROM train t, validation v
QUALIFY row_number() OVER (PARTITION BY v.sample_id ORDER BY s DESC) <= 10
"""
MEMORY, LIMIT = 2e9, 3.0


def in_torch(store: Store, rows: int, queries: int) -> set[tuple[int, int]]:
    """(query, sample) of the ten best of each query."""
    layer = store.layers[0]
    query: Any = store.read(layer, np.arange(rows, rows + queries))
    scores, places = [], []
    for begin in range(0, rows, TILE):
        tile: Any = store.read(layer, np.arange(begin, min(begin + TILE, rows)))
        products = (query.prefix @ tile.prefix.T).mul_(query.suffix @ tile.suffix.T)
        best = products.topk(min(10, products.shape[1]), dim=1)
        scores.append(best.values)
        places.append(best.indices + begin)
    last = torch.cat(scores, 1).topk(10, dim=1).indices
    found = torch.cat(places, 1).gather(1, last).tolist()
    return {(number, sample) for number, samples in enumerate(found) for sample in samples}


class Memory(threading.Thread):
    """Watches this process's anonymous memory."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        """Forever."""
        while True:
            text = Path("/proc/self/status").read_text()
            line = next(line for line in text.splitlines() if line.startswith("RssAnon"))
            self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.005)


def main() -> int:
    """Prints the figures; 0 when they are within the limits and the pairs agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--queries", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    memory, times, differ = Memory(), [], 0
    with tempfile.TemporaryDirectory() as folder:
        fill(
            Path(folder) / "store", [linear("fc", WIDTH, WIDTH)], {"train": options.rows, "validation": options.queries}
        )
        store = Store.open(Path(folder) / "store")
        with metaql.connect(Path(folder) / "store") as db:
            db.sql("SET threads = 1")
            expected = in_torch(store, options.rows, options.queries)
            memory.start()
            for _ in range(options.rounds):
                begin = time.process_time()
                found = {(query, sample) for query, sample, _ in db.sql(QUERY).fetchall()}
                middle = time.process_time()
                in_torch(store, options.rows, options.queries)
                times.append((middle - begin, time.process_time() - middle))
                differ = max(differ, len(found ^ expected))
    ratio = statistics.median(sql / plain for sql, plain in times)
    sql, plain = (statistics.median(each) for each in zip(*times, strict=True))
    pairs = options.rows * options.queries
    print(f"{datetime.now(UTC):%Y-%m-%d}  {platform.processor() or platform.machine()}, {os.cpu_count()} cores, 1 used")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, duckdb {duckdb.__version__}")
    print(f"{options.rows:,} x {options.queries:,} samples, {options.rounds} rounds, CPU time")
    print(f"SQL {sql:.2f} s ({sql / pairs * 1e9:.0f} ns a pair)   torch {plain:.2f} s ({plain / pairs * 1e9:.0f} ns)")
    print(f"median of ratios {ratio:.2f} (limit {LIMIT}); at most {memory.peak / 1e6:.0f} MB of anonymous memory")
    if differ:
        print(f"{differ} pairs differ", file=sys.stderr)
    # Scores that differ in their last digit may change places around the tenth.
    return 0 if differ <= 2 + options.queries // 100 and ratio <= LIMIT and memory.peak <= MEMORY else 1


if __name__ == "__main__":
    sys.exit(main())
