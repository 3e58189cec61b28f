"""What a session's functions have done so far, for EXPLAIN ANALYZE and for tests."""

from __future__ import annotations

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """Totals since the session began; a query's own are a difference of two."""

    calls: int = 0  # times that rows were asked for
    scored: int = 0  # inner products that were computed
    found: int = 0  # inner products that lay ready from before
    seconds: float = 0.0  # spent on computing them, over all threads

    def __sub__(self, before: Counts) -> Counts:
        return Counts(
            self.calls - before.calls,
            self.scored - before.scored,
            self.found - before.found,
            self.seconds - before.seconds,
        )


class Counters:
    """Counts that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = Counts()

    def add(self, calls: int = 0, scored: int = 0, found: int = 0, seconds: float = 0.0) -> None:
        """Adds to the totals."""
        with self._lock:
            now = self._counts
            self._counts = Counts(now.calls + calls, now.scored + scored, now.found + found, now.seconds + seconds)

    def now(self) -> Counts:
        """The totals at this moment."""
        return self._counts
