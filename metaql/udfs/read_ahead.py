"""Scores of the rows that a scan asks for next.

DuckDB hands a function 2,048 rows a call. A product of that size sweeps the processor's caches, so that what Python
does around it takes several times as long as it would warm. Once a scan has asked for rows that follow those before,
what follows in the same record batch is scored too, and the next calls find it here.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from metaql.udfs.references import Floats, Ints

# So much is read ahead at most. Of rows so wide that fewer than a call's fit, each call costs far more than Python.
AHEAD_BYTES = 16 << 20


class ReadAhead(threading.local):
    """The scores that lie ready for one scan in each thread."""

    def __init__(self) -> None:
        self._scan: Any = None
        self._begin = 0
        self._scores: Floats = np.zeros(0)

    def scores(self, scan: Any, rows: Ints, room: Callable[[int], int], score: Callable[[Ints], Floats]) -> Floats:
        """``score(rows)``; ``scan`` says all that the scores of rows depend on, ``room(row)`` how many may be read.

        The rows must exist, and so must those that there is room for.
        """
        first, count = int(rows[0]), len(rows)
        if int(rows[-1]) != first + count - 1 or np.count_nonzero(rows[1:] - rows[:-1] == 1) < count - 1:
            return score(rows)
        same = scan == self._scan
        place = first - self._begin
        if same and 0 <= place <= len(self._scores) - count:
            return self._scores[place : place + count]
        follows = same and place == len(self._scores)
        more = max(count, room(first)) if follows else count
        scores = score(rows if more == count else np.arange(first, first + more))
        self._scan, self._begin, self._scores = scan, first, scores
        return scores[:count]
