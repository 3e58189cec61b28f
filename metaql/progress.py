"""A progress bar for queries that take longer than two seconds."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

import duckdb
from tqdm import tqdm

from metaql.udfs.work import Work

# As long as DuckDB waits with its own.
PATIENCE = 2.0
# DuckDB measures its progress only for a bar, and this one is ours: its own knows nothing of what functions do.
MEASURE = "SET enable_progress_bar = true; SET enable_progress_bar_print = false"


def is_shown() -> bool:
    """Whether there is somebody to see it. In notebooks DuckDB's own bar is seen."""
    return sys.stderr.isatty()


class Progress:
    """A bar on stderr that goes with the query: what it has gathered of a query side, how far a training
    is, or how far DuckDB is."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, work: Work) -> None:
        self._connection, self._work = connection, work
        self._begin = time.monotonic()
        self._bar: Any = None

    def show(self) -> None:
        """Draws the bar as things stand."""
        if time.monotonic() - self._begin < PATIENCE or not is_shown():
            return
        gathered, trained = self._work.gathered, self._work.trained
        if trained is not None:
            self._draw("training", 100 * trained[0], trained[1])
        elif gathered is None:
            self._draw("query", self._connection.query_progress())
        else:
            self._draw("average", 100 * gathered)

    def _draw(self, what: str, percent: float, told: str = "") -> None:
        if percent < 0:
            return
        if self._bar is None or self._bar.desc != what:
            self.close()
            layout = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
            self._bar = tqdm(total=100, desc=what, bar_format=layout, leave=False)
        self._bar.n = max(self._bar.n, min(percent, 100))
        self._bar.set_postfix_str(told, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        """Wipes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
