"""Compares a result with what was expected, rows in any order and numbers up to rounding."""

from __future__ import annotations

import math
from typing import Any

Rows = list[tuple[Any, ...]]


def differences(expected: Rows, found: Rows, tolerance: float, order: tuple[int, bool] | None = None) -> str | None:
    """What is wrong; None if nothing is. ``order`` is the column that the found rows must be sorted by."""
    if not _alike(expected, found, tolerance):
        return f"expected\n{_printed(expected)}\ngot\n{_printed(found)}"
    if order is not None and not _sorted([row[order[0]] for row in found], order[1]):
        return f"not in order:\n{_printed(found)}"
    return None


def _alike(expected: Rows, found: Rows, tolerance: float) -> bool:
    """Whether each found row can be paired with an expected one."""
    if len(expected) != len(found):
        return False
    left = sorted(expected, key=_rank)
    for row in sorted(found, key=_rank):
        # Rounding may have sorted near ones another way.
        place = next((k for k, other in enumerate(left) if _same_row(other, row, tolerance)), None)
        if place is None:
            return False
        del left[place]
    return True


def _same_row(one: tuple[Any, ...], other: tuple[Any, ...], tolerance: float) -> bool:
    return len(one) == len(other) and all(_same(a, b, tolerance) for a, b in zip(one, other, strict=True))


def _same(one: Any, other: Any, tolerance: float) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return one is not None and other is not None and math.isclose(one, other, rel_tol=1e-5, abs_tol=tolerance)
    return bool(one == other)


def _rank(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple((value is None, str(type(value)) if isinstance(value, str) else "", value or 0) for value in row)


def _sorted(values: list[Any], descending: bool) -> bool:
    """NULL last in both directions."""
    known = [value for value in values if value is not None]
    return values[: len(known)] == sorted(known, reverse=descending)


def _printed(rows: Rows) -> str:
    return "\n".join(str(row) for row in sorted(rows, key=_rank)[:20]) + (
        f"\n… {len(rows)} rows" if len(rows) > 20 else ""
    )
