"""Inner products of many rows with many: as matrices where that pays, in pieces of a bounded size."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch

from metaql.storage.blocks import Block
from metaql.udfs import costs
from metaql.udfs.costs import Side
from metaql.udfs.kernels import matrix, pairs, side
from metaql.udfs.patterns import Term
from metaql.udfs.references import Floats, Ints
from metaql.udfs.rows import BLOCK_BYTES, Rows, floats
from metaql.udfs.session import Session
from metaql.udfs.slices import steps

# A matrix may hold this many times the pairs asked for: a product of matrices is so much faster than single ones.
MATRIX_WASTE = 4
# From so many pairs for each distinct reference on, one matrix row at a time beats gathering both sides.
REPEATS = 8
# A product takes at most about so long, since nothing can stop it.
PIECE_SECONDS = 0.1


def every_pair(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Floats:
    """Every left row with every right one: [l, r]."""
    start = time.perf_counter()
    result = torch.zeros(len(left), len(right), dtype=torch.float64)
    for number, term in enumerate(terms):
        for down in left.blocks(term.left):
            block = left.read(term.left, down)
            for across in _columns(session, term, block, right):
                session.work.go_on()
                piece = matrix(term, block, right.read(term.right, across), session.costs).cpu()
                # Converted and added where they belong, without a matrix in between.
                result[down, across].add_(piece) if number else result[down, across].copy_(piece)
    values: Floats = result.numpy()
    session.counters.add(scored=values.size, seconds=time.perf_counter() - start)
    return values


def _columns(session: Session, term: Term, left: Block, right: Rows) -> Iterator[slice]:
    """Slices of the right rows whose product with a block takes a fraction of a second, so that it can be stopped."""
    for part in right.blocks(term.right):
        count = part.stop - part.start
        seconds = 0.0
        if term.by_factors:
            other = Side(count, right.source.positions(term.right, right.numbers[part]))
            ways = costs.matrix(session.costs, term.left, side(left), other)
            seconds = ways[session.costs.choose(ways)]
        size = max(1, int(count * PIECE_SECONDS / max(seconds, PIECE_SECONDS)))
        for begin in range(part.start, part.stop, size):
            yield slice(begin, min(begin + size, part.stop))


def side_by_side(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Floats:
    """Each left row with the right one beside it, [n], by way of whichever products are fewest."""
    rows, place = np.unique(left.numbers, return_inverse=True)
    others, other_place = np.unique(right.numbers, return_inverse=True)
    if len(rows) * len(others) <= MATRIX_WASTE * len(left):
        table = every_pair(session, terms, Rows(left.source, rows), Rows(right.source, others))
        scores: Floats = table[place, other_place]
        return scores
    if len(others) * REPEATS <= len(left):
        return _column_by_column(session, terms, left, Rows(right.source, others), other_place)
    if len(rows) * REPEATS <= len(left):
        return _column_by_column(session, terms, right, Rows(left.source, rows), place, turned=True)
    return _pair_by_pair(session, terms, left, right)


def _column_by_column(
    session: Session, terms: tuple[Term, ...], left: Rows, right: Rows, group: Ints, turned: bool = False
) -> Floats:
    """Each distinct right reference with those rows that stand beside it; ``turned`` when the sides are swapped."""
    result = np.zeros(len(left))
    order = np.argsort(group, kind="stable")
    edges = np.searchsorted(group[order], np.arange(len(right) + 1))
    for number in range(len(right)):
        places = order[edges[number] : edges[number + 1]]
        some, one = Rows(left.source, left.numbers[places]), Rows(right.source, right.numbers[number : number + 1])
        result[places] = (
            every_pair(session, terms, one, some)[0] if turned else every_pair(session, terms, some, one)[:, 0]
        )
    return result


def _pair_by_pair(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Floats:
    start = time.perf_counter()
    result = np.zeros(len(left))
    for term in terms:
        size = max(left.source.row_bytes(term.left), right.source.row_bytes(term.right))
        for part in steps(len(left), size / 4, BLOCK_BYTES):
            session.work.go_on()
            block, other = left.read(term.left, part), right.read(term.right, part)
            result[part] += floats(pairs(term, block, other, session.costs))
    session.counters.add(scored=len(left), seconds=time.perf_counter() - start)
    return result
