"""Many rows against one vector: block by block, or only those rows that are asked for.

DuckDB calls with at most 2,048 rows, fewer where a filter has left some out. Reading a whole block of rows in order
and multiplying it at once is several times faster for each row than gathering some, and spares the later calls; so a
block is scored whole, and kept, when that takes less than gathering the rows that are likely to be asked of it. The
guess may be wrong: what gathering costs is added up for each block, and once that reaches what the whole block would
have cost, the block is scored whole.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from math import inf

import numpy as np

from metaql.storage.blocks import Block
from metaql.storage.schema import Layer
from metaql.udfs.costs import CALL_ROWS, PROBE, SCAN, Prices, Side, prices
from metaql.udfs.kept_scores import Key
from metaql.udfs.kernels import matrix
from metaql.udfs.patterns import Term
from metaql.udfs.references import Floats
from metaql.udfs.rows import Rows
from metaql.udfs.session import Session

# A block of rows is so large that Python does not count, and so small that a LIMIT wastes little.
BLOCK_SECONDS = 1e-2
LARGEST_BLOCK = 8 * CALL_ROWS


def scores(session: Session, terms: tuple[Term, ...], left: Rows, one: Rows, expected: float | None) -> Floats:
    """⟨row, one⟩ for each row on the left: [n].

    ``expected`` is how many rows will be asked for in all, by this call and later ones; None when nobody knows.
    """
    numbers = left.numbers
    ends = (numbers[0], numbers[-1]) if left.consecutive else (numbers.min(), numbers.max())
    low, high = int(ends[0]), int(ends[1])
    begin, end = left.source.stretch(low)
    window = max(high - low + 1, min(CALL_ROWS, end - begin))
    share = min(len(left) / window if expected is None else expected / max(end - begin, 1), 1.0)
    column = _Column(session, terms, left, one, max(share * (end - begin), len(left)))
    if end - begin <= 1 or high >= end:
        return column.computed(left)
    return column.by_block(begin, end, low, high, share)


@dataclass(frozen=True)
class _Column:
    """Rows and a vector, of which ``expected`` rows will be asked for in all."""

    session: Session
    terms: tuple[Term, ...]
    left: Rows
    one: Rows
    expected: float

    def by_block(self, begin: int, end: int, low: int, high: int, share: float) -> Floats:
        """The scores. All rows from ``begin`` to ``end`` exist, and about this share of them will be asked for."""
        numbers, size = self.left.numbers, _block_rows(self._prices)
        first = begin + (low - begin) // size * size
        if high < first + size:
            found = self._block(first, min(first + size, end), len(numbers), share)
            return self.computed(self.left) if found is None else found[numbers - first]
        if self.left.consecutive:
            return self._stretch(begin, end, first, size, share)
        starts = begin + (numbers - begin) // size * size
        result, missing = np.empty(len(numbers)), np.zeros(len(numbers), dtype=np.bool_)
        for first in np.unique(starts).tolist():
            places = np.flatnonzero(starts == first)
            found = self._block(first, min(first + size, end), len(places), share)
            if found is None:
                missing[places] = True
            else:
                result[places] = found[numbers[places] - first]
        if missing.any():
            result[missing] = self.computed(Rows(self.left.source, numbers[missing]))
        return result

    def _stretch(self, begin: int, end: int, first: int, size: int, share: float) -> Floats:
        """As ``by_block``, where the rows follow one another: no row's block need be looked up."""
        low, high = int(self.left.numbers[0]), int(self.left.numbers[-1]) + 1
        result = np.empty(len(self.left))
        for start in range(first, high, size):
            stop = min(start + size, end)
            part = slice(max(start, low), min(stop, high))
            found = self._block(start, stop, part.stop - part.start, share)
            if found is None:
                numbers = np.arange(part.start, part.stop)
                result[part.start - low : part.stop - low] = self.computed(Rows(self.left.source, numbers, True))
            else:
                result[part.start - low : part.stop - low] = found[part.start - start : part.stop - start]
        return result

    def _block(self, begin: int, end: int, asked: int, share: float) -> Floats | None:
        """A whole block's scores; None when it costs less to score only what is asked for."""
        kept, key = self.session.kept_scores, (self._key, begin, end)
        found = kept.get(key)
        if found is not None:
            self.session.counters.add(calls=1, found=asked)
            return found
        whole, some = self._prices.scan(end - begin), self._prices.probe(asked)
        calls = max(share * (end - begin) / asked, 1.0)
        ways = {SCAN: whole, PROBE: inf if kept.spent(key) > whole else calls * some}
        if self.session.costs.choose(ways) == PROBE:
            kept.spend(key, some)
            return None
        found = self.computed(Rows(self.left.source, np.arange(begin, end), consecutive=True))
        kept.put(key, found)
        return found

    def computed(self, left: Rows) -> Floats:
        """The scores of these rows, layer by layer."""
        start = time.perf_counter()
        result = np.zeros(len(left))
        for term in self.terms:
            other = self._other(term, left)
            for part in left.blocks(term.left):
                self.session.work.go_on()
                found = matrix(term, left.read(term.left, part), other, self.session.costs)
                result[part] += found[:, 0].cpu().numpy()
        self.session.counters.add(calls=1, scored=len(left), seconds=time.perf_counter() - start)
        return result

    def _other(self, term: Term, left: Rows) -> Block:
        if not term.by_factors:
            return self.one.read(term.right)
        side = Side(len(left), _mean_positions(left, term.left))
        return self.one.source.against(term.right, int(self.one.numbers[0]), side, max(self.expected, len(left)))

    @cached_property
    def _key(self) -> Key:
        # The terms are kept with their spaces, so that no other has their id.
        return self.left.source, id(self.terms), self.one.source, int(self.one.numbers[0])

    @cached_property
    def _prices(self) -> Prices:
        kept, key = self.session.kept_scores, self._key
        found = kept.prices.get(key)
        if found is None:
            found = prices(self.session.costs, [self._positions(term) for term in self.terms])
            kept.prices.put(key, found, 1)
        return found

    def _positions(self, term: Term) -> tuple[Layer, float | None, float | None]:
        if not term.by_factors:
            return term.left, None, None
        return term.left, _mean_positions(self.left, term.left), self.one.source.positions(term.right, self.one.numbers)


def _mean_positions(left: Rows, layer: Layer) -> float | None:
    return left.source.positions(layer, left.numbers[:1])


def _block_rows(costs: Prices) -> int:
    """Rows of a block: some calls' worth."""
    rows = CALL_ROWS
    while rows < LARGEST_BLOCK and costs.scan(2 * rows) < BLOCK_SECONDS:
        rows *= 2
    return rows
