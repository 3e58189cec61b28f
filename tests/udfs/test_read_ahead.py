"""What lies ready is what would have been computed, and nothing is read ahead that no scan asks for."""

from __future__ import annotations

import numpy as np

from metaql.udfs.read_ahead import ReadAhead
from metaql.udfs.references import Floats, Ints


def _squares(asked: list[int], ahead: ReadAhead, scan: str, rows: Ints, end: int = 100) -> Floats:
    def score(numbers: Ints) -> Floats:
        asked.append(len(numbers))
        return numbers.astype(np.float64) ** 2

    return ahead.scores(scan, rows, lambda row: min(8, end - row), score)


def test_a_scan_is_read_ahead_from_its_second_call_on() -> None:
    asked: list[int] = []
    ahead = ReadAhead()
    parts = [_squares(asked, ahead, "scan", np.arange(begin, begin + 2), end=12) for begin in range(0, 12, 2)]
    assert np.concatenate(parts).tolist() == [row**2 for row in range(12)]
    assert asked == [2, 8, 2]


def test_other_rows_and_other_scans_are_computed_as_asked() -> None:
    asked: list[int] = []
    ahead = ReadAhead()
    for scan, rows in [("a", [0, 1]), ("b", [2, 3]), ("b", [5, 4]), ("b", [7, 9]), ("b", [20, 21]), ("a", [22, 23])]:
        assert _squares(asked, ahead, scan, np.array(rows)).tolist() == [row**2 for row in rows]
    assert asked == [2] * 6
