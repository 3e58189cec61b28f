"""What do a first and a second question cost with MetaQL, and with other libraries, on the same model and data?

N training samples are scored against M query samples, cold (from nothing: importing, preparing, scoring), and again
against M other query samples. Every library runs in a process and an environment of its own, in the setting that its
documentation recommends for speed, on one thread; the ways take turns. Exits with 1 when scores that are meant to be
exact are not, or a promise is not kept.

    python -m bench.peers                                # N = 5,000, M = 100
    python -m bench.peers --full                         # N = 10,000, M = 200, and a VGG16
    python -m bench.peers --environments DIR             # where to make the environments; .peers by default
    python -m bench.peers --only metaql,torch,captum     # some packages
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from bench.peers.case import NETWORKS
from bench.peers.findings import page, plot, promises
from bench.peers.prepare import case
from bench.peers.run import ROOT, Limits, is_exact_over_all, rows
from bench.peers.ways import WAYS
from bench.report import Report, require


def main() -> int:
    """Measures and reports; 0 when all is right and kept."""
    options = _options()
    torch.set_num_threads(1)
    report = Report("peers", "What do a first and a second question cost, here and with other libraries?")
    chosen = [way for way in WAYS.values() if options.only is None or way.package in options.only.split(",")]
    networks = list(NETWORKS) if options.full else list(NETWORKS)[:2]
    for network in networks:
        asked = case(network, options.rows, options.queries)
        for row in rows(asked, chosen, options.environments, Limits(options.limit, options.rounds)):
            report.add(**row)
            way = WAYS[row["way"]]
            require(way.package != "metaql" or "error" not in row, f"{way.name}: {row.get('error')}")
            if is_exact_over_all(way) and "error" not in row:
                require(
                    row["difference"] < 1e-3, f"{way.name} is meant to be exact and is off by {row['difference']:.2g}"
                )
            if "likeness" in row:
                require(
                    row["likeness"] > 0.999,
                    f"{way.name} and {way.agrees_with} are to compute the same, and rank samples with a correlation of"
                    f" {row['likeness']:.4f}",
                )
    promises(report)
    report.remark(
        f"{options.rows:,} training and {options.queries} query samples, {options.rounds} rounds in turns, medians; "
        "one thread each, though MetaQL's store is written by a second one. Cold is from nothing to the first scores, "
        "without torch's own import and reading the data, which are the same for all"
    )
    return report.write(page(report), plot(report))


def _options() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--rows", type=int, help="training samples")
    parser.add_argument("--queries", type=int, help="query samples in each of the two questions")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one process")
    parser.add_argument("--environments", type=Path, default=ROOT / ".peers")
    parser.add_argument("--only", help="packages, separated by commas")
    options = parser.parse_args()
    options.rows = options.rows or (10_000 if options.full else 5_000)
    options.queries = options.queries or (200 if options.full else 100)
    options.environments = options.environments.resolve()
    return options


if __name__ == "__main__":
    sys.exit(main())
