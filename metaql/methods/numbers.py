"""Numbers that users give as settings."""

from __future__ import annotations

from typing import TypeGuard

from metaql.errors import QueryError


def require_whole(name: str, value: object) -> None:
    """QueryError unless the value is a whole number from 1 on."""
    if not _is_integer(value) or value < 1:
        raise QueryError(f"{name} must be a whole number from 1 on, not {value!r}")


def require_seed(seed: object) -> None:
    """QueryError unless torch's random numbers can begin with it."""
    if not _is_integer(seed) or not 0 <= seed < 2**63:
        raise QueryError(f"seed must be a whole number from 0 on, not {seed!r}")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
