"""Which relations of a block could be gathered: those that stand on one side of its inner products."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from metaql.logical import OUTER, Block, reads_of

Side = frozenset[str]


def sides(block: Block) -> list[Side]:
    """Each side on its own, the one on the right of the first product first."""
    found: list[Side] = []
    for seed, opposite in _seeds(block):
        side = _component(block, seed, opposite)
        others = (block.aliases | _read(block)) - side
        if side and side not in found and others:
            found.append(side)
    return found


def _read(block: Block) -> Side:
    """What the aggregates read; with OUTER, where they do, the rows around the query are a side of their own."""
    return frozenset().union(*(one.reads for one in block.aggregates))


def _seeds(block: Block) -> Iterator[tuple[Side, Side]]:
    products = [term.vectors for one in block.aggregates for term in one.terms if len(term.vectors) == 2]
    for left, right in products:
        if not left.reads & right.reads:
            yield right.reads - {OUTER}, left.reads
            yield left.reads - {OUTER}, right.reads
    if not products:
        yield from ((frozenset([alias]), frozenset()) for alias in sorted(block.aliases, reverse=True))


def _component(block: Block, seed: Side, opposite: Side) -> Side:
    """The seed with all that is tied to it otherwise than through the opposite side."""
    side, before = seed, frozenset[str]()
    while side != before:
        before = side
        for tie in (*_ties(block), *_patterns(block, opposite)):
            if tie & side:
                side = side | (tie - opposite - {OUTER})
    return side & block.aliases


def _ties(block: Block) -> Iterable[Side]:
    yield from (conjunct.reads for conjunct in block.conjuncts)
    for aggregate in block.aggregates:
        for term in aggregate.terms:
            yield from (reads_of(factor) for factor in term.factors)
            yield from (vector.reads for vector in term.vectors)


def _patterns(block: Block, opposite: Side) -> Iterator[Side]:
    """Restrictions to layers go along with a side, whichever vector they stand at, if the other has no part in them."""
    for aggregate in block.aggregates:
        for vectors in (term.vectors for term in aggregate.terms if len(term.vectors) == 2):
            for pattern in (pattern for vector in vectors for pattern in vector.patterns):
                if not pattern.reads & opposite:
                    yield from (pattern.reads | vector.reads for vector in vectors if not vector.reads & opposite)
