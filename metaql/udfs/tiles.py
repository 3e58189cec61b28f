"""Inner products of many rows with many: as matrices where that pays, in pieces of a bounded size."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import groupby
from math import ceil

import numpy as np
import torch
from torch import Tensor

from metaql.storage.blocks import Full
from metaql.storage.schema import Layer
from metaql.udfs import costs
from metaql.udfs.costs import FULL, GRAM, Side
from metaql.udfs.eigenbasis import InEigenbasis, in_eigenbasis
from metaql.udfs.fused import fused_blocks, fused_term, fused_terms
from metaql.udfs.kernels import LAID_OUT_BUDGET, matrix, pairs, restored, side
from metaql.udfs.patterns import Term
from metaql.udfs.references import Floats, Ints
from metaql.udfs.rows import BLOCK_BYTES, Rows, floats
from metaql.udfs.session import Session
from metaql.udfs.slices import numbers, steps, summed

# A matrix may hold this many times the pairs asked for: a product of matrices is so much faster than single ones.
MATRIX_WASTE = 4
# From so many pairs for each distinct reference on, one matrix row at a time beats gathering both sides.
REPEATS = 8
# A product takes at most about so long, since nothing can stop it.
PIECE_SECONDS = 0.1
# Gradients that were laid out for many products.
KEPT_BYTES = 256 << 20
# Gradients that are laid out to be multiplied with those: the more of them, the fewer times those are read.
TILE_BYTES = 128 << 20
# Rows, columns, and their products.
Piece = tuple[slice, slice, Tensor]


def every_pair(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Floats:
    """Every left row with every right one: [l, r], which is kept and not to be written to."""
    # The terms are kept with their spaces, so that no other has their id.
    key = left.source, right.source, id(terms), left.numbers.tobytes(), right.numbers.tobytes()
    values = session.kept_scores.pairs(key)
    if values is not None:
        session.counters.add(found=values.size)
        return values
    start = time.perf_counter()
    values = _every_pair(session, terms, left, right)
    session.kept_scores.put_pairs(key, values)
    session.counters.add(scored=values.size, seconds=time.perf_counter() - start)
    return values


def _every_pair(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Floats:
    result = torch.zeros(len(left), len(right), dtype=torch.float64)
    for number, group in enumerate(_groups(session, terms, left, right)):
        for down, across, piece in _pieces(session, group, left, right):
            # Converted and added where they belong, without a matrix in between.
            place = result[down, across]
            place.add_(piece.cpu()) if number else place.copy_(piece)
    values: Floats = result.numpy()
    return values


def _pieces(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Iterator[Piece]:
    found = in_eigenbasis(session, terms[0], left, right)
    if found is not None:
        return _preconditioned(session, found, left)
    pieces = _laid_out if _way(session, terms[0], left, right) == FULL else _as_stored
    return pieces(session, terms, left, right)


def _preconditioned(session: Session, found: InEigenbasis, left: Rows) -> Iterator[Piece]:
    """As many vectors as may be kept are preconditioned, and all rows are turned once for each lot of these."""
    for lot in steps(len(found.vectors), found.numbers, KEPT_BYTES):
        theirs = found.preconditioned(session, lot)
        for down in left.blocks(found.term.left):
            ours = found.turned(left.read(found.term.left, down))
            for part in _short(
                session, found.pieces[0].term, side(ours[0]), side(theirs[0]), slice(0, lot.stop - lot.start)
            ):
                session.work.go_on()
                across = slice(lot.start + part.start, lot.start + part.stop)
                yield down, across, found.products(session, ours, theirs, part)


def _way(session: Session, term: Term, left: Rows, right: Rows) -> str | None:
    """The cheapest for all rows of a layer that both sides keep in factors; None where there is none for all."""
    if not term.by_factors:
        return None
    ways = costs.matrix(session.costs, term.left, _side(left, term.left), _side(right, term.right))
    return session.costs.choose(ways) if GRAM in ways else None


def _groups(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Iterator[tuple[Term, ...]]:
    """The terms in their order, those together that are multiplied as one: it spares products of factors only."""
    for by_factors, found in groupby(terms, lambda term: _way(session, term, left, right) == GRAM):
        some = tuple(found)
        yield from fused_terms(some, left, right) if by_factors else [(term,) for term in some]


def _as_stored(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Iterator[Piece]:
    """In the way that is the cheapest for each pair of blocks."""
    first, term = terms[0], fused_term(terms)
    for down in left.blocks(first.left):
        blocks = [left.read(each.left, down) for each in terms]
        fused = fused_blocks(blocks)
        for part in right.blocks(first.right):
            for across in _short(session, term, side(blocks[0]), _side(right, first.right, part), part):
                session.work.go_on()
                others = [right.read(each.right, across) for each in terms]
                theirs = fused_blocks(others)
                if fused is not None and theirs is not None:
                    yield down, across, matrix(term, fused, theirs, session.costs)
                else:
                    alone = zip(terms, blocks, others, strict=True)
                    yield down, across, summed([matrix(*each, session.costs) for each in alone])


def _laid_out(session: Session, terms: tuple[Term, ...], left: Rows, right: Rows) -> Iterator[Piece]:
    """As many right gradients as may be kept are laid out once, and the left ones once for each lot of these."""
    (term,) = terms
    nothing = space = torch.empty(0)
    for across in steps(len(right), term.right.width, KEPT_BYTES):
        kept = Full(_restored(session, term.right, right, across, nothing))
        for part in steps(len(left), term.left.width, TILE_BYTES):
            tile = _restored(session, term.left, left, part, space)
            space = max(space, tile, key=len)
            for down in _short(session, term, side(kept), Side(len(tile), None), slice(0, len(tile))):
                session.work.go_on()
                place = slice(part.start + down.start, part.start + down.stop)
                yield place, across, matrix(term, Full(tile[down]), kept, session.costs)


def _restored(session: Session, layer: Layer, rows: Rows, part: slice, space: Tensor) -> Tensor:
    """Gradients laid out a few at a time, in the space if that is large enough: [rows, layer.width]."""
    count = part.stop - part.start
    for some in steps(count, layer.width, LAID_OUT_BUDGET):
        session.work.go_on()
        stored, block = rows.stored(layer, slice(part.start + some.start, part.start + some.stop))
        space = numbers(block).new_empty(count, layer.width) if len(space) < count else space
        restored(stored, block, space[some])
    return space[:count]


def _side(rows: Rows, layer: Layer, part: slice = slice(None)) -> Side:
    numbers = rows.numbers[part]
    together = rows.source.positions(layer, numbers)
    return Side(len(numbers), None if together is None else together / max(len(numbers), 1))


def _short(session: Session, term: Term, one: Side, other: Side, part: slice) -> Iterator[slice]:
    """The other's part in slices whose products with one take a fraction of a second, so that they can be stopped."""
    seconds = 0.0
    if term.by_factors:
        ways = costs.matrix(session.costs, term.left, one, other)
        seconds = ways[session.costs.choose(ways)]
    size = max(1, ceil((part.stop - part.start) / max(1, round(seconds / PIECE_SECONDS))))
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
