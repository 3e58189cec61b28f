"""How much slower is the way that was chosen than the best one?

Scores a random part of a layer's stored rows against an average, in calls of 2,048 rows less those that a filter left
out, as DuckDB makes them: once as MetaQL chooses, and once with each way forced (factors, contraction or full; whole
blocks or single rows). All run in turns on one thread, in random order, each with an average that is made anew. A
cell's regret is the chosen way's CPU time over that of the best way, by the median of the rounds' ratios. Exits with 1
when fewer than 95 % of the cells are within 1.3, or one is above 5.

    python -m bench.regret --cells 40 --seed 1   # random cells; a few minutes
    python -m bench.regret --cells 0             # the full grid; hours

Rows are as many as make a cell last about a second, at most 50,000. Cells whose query side does not fit are left out.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from bench.report import processor
from bench.timing import seconds
from metaql import calibrate
from metaql.storage.blocks import Block, Factored, Full
from metaql.storage.layout import choose
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.storage.store import Store
from metaql.storage.writer import Writer
from metaql.udfs import costs
from metaql.udfs.costs import CALL_ROWS, CONTRACT, FULL, GRAM, PROBE, SCAN, Constants, Side
from metaql.udfs.definitions import combine
from metaql.udfs.references import References
from metaql.udfs.scoring import inner_products
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource

POSITIONS, WIDTHS = (1, 4, 16, 64, 256, 1024), (16, 64, 256, 1024)
QUERY_ROWS, SHARES = (1, 10, 100, 1000), (0.001, 0.01, 0.1, 1.0)
STORE_BYTES, QUERY_BYTES = 192 << 20, 256 << 20
# What one run of the cheapest way should take at most, by the model.
RUN_SECONDS = 0.1
# A way that took so many times the best in the first round is not asked again.
HOPELESS = 6.0
WITHIN, SHARE_WITHIN, WORST = 1.3, 0.95, 5.0


@dataclass(frozen=True)
class Cell:
    """A layer's shape, the rows of the query side, and the share of the stored rows that a filter leaves."""

    positions: int
    inputs: int
    outputs: int
    query_rows: int
    share: float

    @property
    def layer(self) -> Layer:
        """As a recorder would keep it."""
        i, o, positions = self.inputs, self.outputs, self.positions
        layer = Layer("fc", "linear", (Parameter("fc.weight", (o, i)),), FACTORED, "float32", 1, i, o, positions)
        return choose(layer, positions)

    @property
    def row_bytes(self) -> int:
        """Of a stored row."""
        return 4 * (
            self.positions * (self.inputs + self.outputs) if self.layer.layout == FACTORED else self.layer.width
        )

    @property
    def rows(self) -> int:
        """How many are stored."""
        side = costs.stored(self.layer, 1000)
        ways = costs.against(costs.SHIPPED, self.layer, side, self.positions * self.query_rows)
        seconds = min(ways.values()) / 1000
        return max(int(min(50_000, STORE_BYTES / self.row_bytes, RUN_SECONDS / seconds)), 16)

    def __str__(self) -> str:
        return (
            f"{self.positions:>4} positions {self.inputs:>4} -> {self.outputs:<4} {self.rows:>6,} rows"
            f" {100 * self.share:>5g} % against {self.query_rows:>4}"
        )


def cells() -> list[Cell]:
    """The grid, without what does not fit."""
    grid = itertools.product(POSITIONS, WIDTHS, WIDTHS, QUERY_ROWS, SHARES)
    return [cell for cell in itertools.starmap(Cell, grid) if cell.query_rows * cell.row_bytes <= QUERY_BYTES]


def record(path: Path, cell: Cell) -> None:
    """The cell's store."""
    layer = cell.layer
    with Writer.open(path) as writer:
        writer.define("bench", (layer,), "float32")
        checkpoint = writer.add_checkpoint({"weight": torch.ones(1)}, "bench", None, {})
        for split, rows in (("train", cell.rows), ("validation", cell.query_rows)):
            collection = writer.collection(split, checkpoint)
            step = max(1, (16 << 20) // cell.row_bytes)
            for begin in range(0, rows, step):
                count = min(step, rows - begin)
                collection.append(np.arange(begin, begin + count), {"fc": block(layer, count)}, np.zeros(count))
            collection.finish()


def block(layer: Layer, samples: int) -> Block:
    """Random gradients."""
    if layer.layout != FACTORED:
        return Full(torch.randn(samples, layer.width))
    count = samples * (layer.positions or 1)
    return Factored(torch.randn(count, layer.input_width or 0), torch.randn(count, layer.output_width or 0), samples)


def ways(layer: Layer) -> list[frozenset[str]]:
    """Everything that can be forced."""
    kernels = (GRAM, CONTRACT, FULL) if layer.layout == FACTORED else (FULL,)
    return [frozenset(pair) for pair in itertools.product(kernels, (SCAN, PROBE))]


def run(source: StoreSource, cell: Cell, rows: np.ndarray, machine: Constants) -> np.ndarray:
    """The scores of some rows, by a session that knows nothing yet."""
    session = Session()
    session.costs = machine
    session.add(source)
    store, query = source.store.id, np.arange(cell.rows, cell.rows + cell.query_rows)
    weights = np.full(len(query), 1 / len(query))
    number = session.vectors.add(combine(session, references(store, query), weights))
    scores = []
    for begin in range(0, cell.rows, CALL_ROWS):
        some = rows[np.searchsorted(rows, begin) : np.searchsorted(rows, begin + CALL_ROWS)]
        if len(some):
            vector = references(session.id, np.full(len(some), number))
            scores.append(inner_products(session, references(store, some), vector))
    return np.concatenate(scores)


def references(store: int, rows: np.ndarray) -> References:
    """Whole gradients."""
    return References(np.full(len(rows), store), rows, None, ("",))


def measure(cell: Cell, machine: Constants, rounds: int, rng: random.Random) -> tuple[float, str]:
    """(regret, what was best), or the regret 0 where a way gives other scores."""
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder) / "store", cell)
        source = StoreSource(Store.open(Path(folder) / "store"), "bench")
        survivors = np.random.default_rng(rng.getrandbits(32)).random(cell.rows) < cell.share
        survivors[rng.randrange(cell.rows)] = True
        rows = np.flatnonzero(survivors)
        machines = {way: replace(machine, forced=way) for way in [frozenset(), *ways(cell.layer)]}
        machines = {way: one for way, one in machines.items() if predicted(cell, way) < 20}
        expected = run(source, cell, rows, machine)
        times: dict[frozenset[str], list[float]] = {way: [] for way in machines}
        for number in range(rounds):
            for way in shuffled(times, rng):
                one = seconds(lambda way=way: same(run(source, cell, rows, machines[way]), expected))  # type: ignore[misc]
                times[way].append(one.cpu)
            if number == 0:
                best = min(each[0] for each in times.values())
                times = {way: one for way, one in times.items() if not way or one[0] < HOPELESS * best}
        chosen = times.pop(frozenset())
        regrets = {
            way: statistics.median(ours / theirs for ours, theirs in zip(chosen, each, strict=True))
            for way, each in times.items()
        }
        best_way = max(regrets, key=lambda way: regrets[way]) if regrets else frozenset({"chosen"})
        told = f"{'/'.join(sorted(best_way))} {statistics.median(times.get(best_way, chosen)) * 1e3:.2f} ms"
        return max(regrets.get(best_way, 1.0), 1.0), f"{told}, chosen {statistics.median(chosen) * 1e3:.2f} ms"


def predicted(cell: Cell, way: frozenset[str]) -> float:
    """Seconds by the model, so that nobody waits for minutes."""
    rows = cell.rows if SCAN in way else max(cell.rows * cell.share, 1)
    positions = cell.positions if cell.layer.layout == FACTORED else None
    left, right = Side(rows, positions), Side(1, None if positions is None else positions * cell.query_rows)
    found = costs.matrix(costs.SHIPPED, cell.layer, left, right)
    return min((found[one] for one in way if one in found), default=0.0)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Every way has to give the same scores, to float32 rounding of sums of up to a million products."""
    if not np.allclose(found, expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max()):
        raise SystemExit("two ways give different scores")


def shuffled(items: dict[frozenset[str], list[float]], rng: random.Random) -> Iterator[frozenset[str]]:
    """In an order that favours none."""
    order = sorted(items, key=sorted)
    rng.shuffle(order)
    yield from order


def main() -> int:
    """Prints each cell's regret; 0 when the promise is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=40, help="how many random cells; 0 for all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    grid = cells()
    chosen = rng.sample(grid, options.cells) if options.cells else grid
    machine = calibrate.constants()
    print(f"{datetime.now(UTC):%Y-%m-%d}  {processor()}, {os.cpu_count()} cores, torch {torch.__version__}, 1 thread")
    regrets = []
    for cell in chosen:
        regret, told = measure(cell, machine, options.rounds, rng)
        regrets.append(regret)
        print(f"{cell}  {regret:5.2f}  {told}", flush=True)
    share = sum(regret <= WITHIN for regret in regrets) / len(regrets)
    print(f"{len(regrets)} cells: {100 * share:.0f} % within {WITHIN}, worst {max(regrets):.2f}")
    return 0 if share >= SHARE_WITHIN and max(regrets) <= WORST else 1


if __name__ == "__main__":
    sys.exit(main())
