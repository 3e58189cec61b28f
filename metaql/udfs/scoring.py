"""Inner products of references: finds the rows, and picks how many to multiply with how many.

A chunk of pairs is scored as a matrix wherever few distinct references stand on one side (a cross join hands
over one query sample with thousands of training samples), and pair by pair otherwise.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from metaql.udfs import column
from metaql.udfs.kernels import matrix, pairs
from metaql.udfs.patterns import Term
from metaql.udfs.references import Floats, Ints, References, constant
from metaql.udfs.rows import BLOCK_BYTES, Rows, floats
from metaql.udfs.session import Session
from metaql.udfs.slices import steps

# A matrix may hold this many times the pairs asked for: a product of matrices is so much faster than single ones.
MATRIX_WASTE = 4
# From so many pairs for each distinct reference on, one matrix row at a time beats gathering both sides.
REPEATS = 8


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
            values[found] = _self_products(rows, source.space.shared(pattern, source.space, pattern))
        result[places] = values[inverse.ravel()]
    return result


def _products(
    session: Session, left: tuple[int, str, Ints], right: tuple[int, str, Ints], expected: float | None
) -> Floats:
    result = np.zeros(len(left[2]))
    for source, places in session.resolve(left[0], left[2]):
        for other, inner in session.resolve(right[0], right[2][places]):
            both = _within(places, inner)
            terms = source.space.shared(left[1], other.space, right[1])
            result[both] = _score(session, terms, Rows(source, left[2][both]), Rows(other, right[2][both]), expected)
    return result


def _within(places: Any, inner: Any) -> Any:
    """Places among places; as a rule both are all there are."""
    if isinstance(inner, slice):
        return places
    return inner if isinstance(places, slice) else places[inner]


def _score(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows, expected: float | None) -> Floats:
    """Pair by pair, through a matrix where that is cheaper."""
    if len(left) == 0:
        return np.zeros(0)
    if constant(right.numbers):
        return column.scores(session, terms, left, Rows(right.source, right.numbers[:1]), expected)
    if constant(left.numbers):
        row: Floats = _matrix(terms, Rows(left.source, left.numbers[:1]), right)[0]
        return row
    rows, place = np.unique(left.numbers, return_inverse=True)
    others, other_place = np.unique(right.numbers, return_inverse=True)
    if len(rows) * len(others) <= MATRIX_WASTE * len(left):
        scores: Floats = _matrix(terms, Rows(left.source, rows), Rows(right.source, others))[place, other_place]
        return scores
    if len(others) * REPEATS <= len(left):
        return _column_by_column(terms, left, Rows(right.source, others), other_place)
    if len(rows) * REPEATS <= len(left):
        return _column_by_column(terms, right, Rows(left.source, rows), place, turned=True)
    return _pairs(terms, left, right)


def _column_by_column(terms: tuple[Term, ...], left: Rows, right: Rows, group: Ints, turned: bool = False) -> Floats:
    """Each distinct right reference with those rows that stand beside it; ``turned`` when the sides are swapped."""
    result = np.zeros(len(left))
    order = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[order], np.arange(len(right) + 1))
    for number in range(len(right)):
        places = order[edges[number] : edges[number + 1]]
        some, one = Rows(left.source, left.numbers[places]), Rows(right.source, right.numbers[number : number + 1])
        result[places] = _matrix(terms, one, some)[0] if turned else _matrix(terms, some, one)[:, 0]
    return result


def _matrix(terms: tuple[Term, ...], left: Rows, right: Rows) -> Floats:
    result = np.zeros((len(left), len(right)))
    for term in terms:
        for across in right.blocks(term.right):
            other = right.read(term.right, across)
            for down in left.blocks(term.left):
                result[down, across] += floats(matrix(term, left.read(term.left, down), other))
    return result


def _pairs(terms: tuple[Term, ...], left: Rows, right: Rows) -> Floats:
    result = np.zeros(len(left))
    for term in terms:
        size = max(left.source.row_bytes(term.left), right.source.row_bytes(term.right))
        for part in steps(len(left), size / 4, BLOCK_BYTES):
            result[part] += floats(pairs(term, left.read(term.left, part), right.read(term.right, part)))
    return result


def _self_products(rows: Rows, terms: tuple[Term, ...]) -> Floats:
    result = np.zeros(len(rows))
    for term in terms:
        for part in rows.blocks(term.left):
            block = rows.read(term.left, part)
            result[part] += floats(pairs(term, block, block))
    return result
