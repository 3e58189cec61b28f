"""How much memory of its own does a process need to query a store that is larger than it may have?

Writes a store (2 GB by default), then asks it from a fresh process: the ten best of all rows against an average, pairs
of samples in random order, and a norm of every row. Prints the largest anonymous resident memory seen, and exits with 1
when it exceeds the limit. Linux only.

    python -m bench.memory --gigabytes 2 --limit-gigabytes 1
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

QUERIES = {
    "ten best of all rows": "SELECT inner_product(t.gradient, (SELECT avg(v.gradient) FROM validation v)) AS s"
    " FROM train t ORDER BY s DESC LIMIT 10",
    "pairs in random order": "SELECT sum(inner_product(t.gradient, v.gradient)) FROM"
    " (SELECT * FROM train USING SAMPLE 2000 ROWS) t, (SELECT * FROM validation LIMIT 20) v",
    "norm of every row": "SELECT max(norm(gradient)) FROM train",
}
WIDTH, POSITIONS = 512, 4


def write(path: Path, gigabytes: float) -> int:
    """A store of one linear layer with several positions a sample; returns its rows."""
    from bench.stores import fill, linear

    rows = int(gigabytes * 1e9 / (POSITIONS * 2 * WIDTH * 4))
    fill(path, [linear("fc", WIDTH, WIDTH, POSITIONS)], {"train": rows, "validation": 256})
    return rows


def anonymous_bytes() -> int:
    """Resident anonymous memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def ask(path: Path) -> int:
    """Runs the queries and prints the peak of each; returns the largest."""
    import metaql

    peak, asking = 0, True

    def watch() -> None:
        nonlocal peak
        while asking:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.005)

    threading.Thread(target=watch, daemon=True).start()
    largest = 0
    with metaql.connect(path) as db:
        for name, query in QUERIES.items():
            peak, begin = 0, time.perf_counter()
            db.sql(query).fetchall()
            print(f"{name}: {time.perf_counter() - begin:.1f} s, at most {peak / 1e6:.0f} MB of anonymous memory")
            largest = max(largest, peak)
    asking = False
    return largest


def main() -> int:
    """Prints the figures; 0 when they are within the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--limit-gigabytes", type=float, default=1.0)
    parser.add_argument("--ask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ask:
        return 0 if ask(options.ask) <= options.limit_gigabytes * 1e9 else 1
    with tempfile.TemporaryDirectory() as folder:
        rows = write(Path(folder) / "store", options.gigabytes)
        print(f"{rows} rows, {options.gigabytes} GB")
        limit = ["--limit-gigabytes", str(options.limit_gigabytes)]
        return subprocess.run(
            [sys.executable, "-m", "bench.memory", "--ask", f"{folder}/store", *limit], check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
