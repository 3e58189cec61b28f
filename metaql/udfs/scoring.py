"""Inner products of references: finds the rows, and picks how many to multiply with how many.

A chunk in which one side has a single gradient is a column of scores; any other is scored side by side, as a matrix
wherever few distinct references stand on one side.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metaql.udfs import column
from metaql.udfs.kernels import pairs
from metaql.udfs.patterns import Term
from metaql.udfs.references import Floats, Ints, References, constant
from metaql.udfs.rows import Rows, floats
from metaql.udfs.session import Session
from metaql.udfs.sources import Source
from metaql.udfs.tiles import side_by_side


def inner_products(session: Session, left: References, right: References, expected: float | None = None) -> Floats:
    """⟨left, right⟩ for each place: float64 [n], computed in the stores' own precision layer by layer.

    ``expected`` is about how many left rows each right one will be multiplied with, over all calls; None if unknown.
    """
    one, other = left.only_group(), right.only_group()
    if one is not None and other is not None:
        return _products(session, (*one, left.row), (*other, right.row), expected)
    result = np.zeros(len(left))
    for store, pattern, places in left.groups():
        for other_store, other_pattern, inner in right.at(places).groups():
            both = _within(places, inner)
            group = (store, pattern, left.row[both]), (other_store, other_pattern, right.row[both])
            result[both] = _products(session, *group, expected)
    return result


def squared_norms(session: Session, references: References) -> Floats:
    """⟨g, g⟩ for each place: float64 [n]."""
    result = np.zeros(len(references))
    for store, pattern, places in references.groups():
        distinct, inverse = np.unique(references.row[places], return_inverse=True)
        values = np.zeros(len(distinct))
        for source, found in session.resolve(store, distinct):
            rows = Rows(source, distinct[found])
            values[found] = _self_products(session, rows, source.space.shared(pattern, source.space, pattern))
        result[places] = values[inverse.ravel()]
    return result


def _products(
    session: Session, left: tuple[int, str, Ints], right: tuple[int, str, Ints], expected: float | None
) -> Floats:
    result = np.zeros(len(left[2]))
    for source, places in session.resolve(left[0], left[2]):
        for other, inner in session.resolve(right[0], right[2][places]):
            both = _within(places, inner)
            mine, theirs = (source, left[1], left[2][both]), (other, right[1], right[2][both])
            # The product is symmetric: one gradient on the left is one gradient on the right.
            turned = constant(mine[2]) and not constant(theirs[2])
            result[both] = _score(session, *((theirs, mine) if turned else (mine, theirs)), expected)
    return result


def _within(places: Any, inner: Any) -> Any:
    """Places among places; as a rule both are all there are."""
    if isinstance(inner, slice):
        return places
    return inner if isinstance(places, slice) else places[inner]


def _score(
    session: Session, left: tuple[Source, str, Ints], right: tuple[Source, str, Ints], expected: float | None
) -> Floats:
    """Rows against one gradient, or side by side."""
    if len(left[2]) == 0:
        return np.zeros(0)
    (source, pattern, numbers), (other, other_pattern, others) = left, right
    terms = source.space.shared(pattern, other.space, other_pattern)
    if constant(others):
        return column.scores(session, terms, Rows(source, numbers), Rows(other, others[:1]), expected)
    return side_by_side(session, terms, Rows(source, numbers), Rows(other, others))


def _self_products(session: Session, rows: Rows, terms: tuple[Term, ...]) -> Floats:
    result = np.zeros(len(rows))
    for term in terms:
        for part in rows.blocks(term.left):
            session.work.go_on()
            block = rows.read(term.left, part)
            result[part] += floats(pairs(term, block, block))
    return result
