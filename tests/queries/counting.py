"""Counts what scoring a query takes, whatever its plan looks like."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from metaql.udfs.definitions import combine
from metaql.udfs.references import References
from metaql.udfs.scoring import inner_products


@dataclass
class Work:
    """``pairs`` of references multiplied, and references ``added`` up into vectors."""

    pairs: int = 0
    added: int = 0

    @property
    def total(self) -> int:
        return self.pairs + self.added


@contextmanager
def counted() -> Iterator[Work]:
    """What is multiplied and added up until the end of the block."""
    work = Work()

    def counting_pairs(session: Any, left: References, *rest: Any, **named: Any) -> Any:
        work.pairs += len(left)
        return inner_products(session, left, *rest, **named)

    def counting_added(session: Any, references: References, *rest: Any, **named: Any) -> Any:
        work.added += len(references)
        return combine(session, references, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        _replace(patch, inner_products, counting_pairs)
        _replace(patch, combine, counting_added)
        yield work


def _replace(patch: pytest.MonkeyPatch, function: Callable[..., Any], other: Callable[..., Any]) -> None:
    """In every module that knows it."""
    for name, module in list(sys.modules.items()):
        if name.startswith("metaql.") and getattr(module, function.__name__, None) is function:
            patch.setattr(module, function.__name__, other)
