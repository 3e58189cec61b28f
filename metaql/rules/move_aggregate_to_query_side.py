"""The rewrite behind P2B: the inner product is linear, so an average of scores is one score with an average."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from metaql.logical import Block, Gathered, Relation, Scalar, Score, Vector


def move_aggregate_to_query_side(block: Block) -> Block | None:
    """avg ⟨t, v⟩ over T × Q, by keys of T => avg ⟨t, avg v over Q⟩ over T, where Q has rows.

    Likewise for sum, and for weights of which each reads one side only: a weight of Q's goes along with v.
    Q is a set of relations that no condition ties to the others, and that neither keys nor anything else in the
    block reads. Pairs with a NULL are ignored by avg and sum on either side of the arrow, and they make up a
    rectangle, since whether t (with its weights) is NULL does not depend on v.
    """
    for side in reversed(_independent_sides(block)):
        if all(_fits(score, side) for score in block.scores) and not _reads(side, (*block.keys, *block.others)):
            return _move(block, side)
    return None


def _independent_sides(block: Block) -> list[frozenset[str]]:
    """The smallest sets of relations between which there is no condition, in the order of FROM."""
    sides = [frozenset([relation.alias]) for relation in block.relations]
    for conjunct in block.conjuncts:
        tied = [side for side in sides if side & conjunct.reads]
        if len(tied) > 1:
            place = sides.index(tied[0])
            sides = [side for side in sides if side not in tied]
            sides.insert(place, frozenset().union(*tied))
    return sides if len(sides) > 1 else []


def _reads(side: frozenset[str], expressions: Iterable[Scalar | Vector]) -> bool:
    return any(side & expression.reads for expression in expressions)


def _fits(score: Score, side: frozenset[str]) -> bool:
    """Whether one vector is the side's and the other is not, and no weight mixes the two."""
    one_each = (_on(score.left, side) and _off(score.right, side)) or (
        _off(score.left, side) and _on(score.right, side)
    )
    return one_each and all(_off(weight, side) or weight.reads <= side for weight in score.weights)


def _on(vector: Vector | Gathered, side: frozenset[str]) -> bool:
    return isinstance(vector, Vector) and bool(vector.reads) and vector.reads <= side


def _off(expression: Scalar | Vector | Gathered, side: frozenset[str]) -> bool:
    return isinstance(expression, Gathered) or not expression.reads & side


def _move(block: Block, side: frozenset[str]) -> Block:
    relations = tuple(relation for relation in block.relations if relation.alias in side)
    conjuncts = tuple(conjunct for conjunct in block.conjuncts if conjunct.reads & side)
    return replace(
        block,
        relations=tuple(relation for relation in block.relations if relation.alias not in side),
        conjuncts=tuple(conjunct for conjunct in block.conjuncts if not conjunct.reads & side),
        scores=tuple(_gather(score, side, relations, conjuncts) for score in block.scores),
        not_empty=(*block.not_empty, (relations, conjuncts)),
    )


def _gather(
    score: Score, side: frozenset[str], relations: tuple[Relation, ...], conjuncts: tuple[Scalar, ...]
) -> Score:
    def gathered(vector: Vector) -> Gathered:
        weights = tuple(weight for weight in score.weights if weight.reads & side)
        return Gathered(score.function, weights, vector, relations, conjuncts)

    left, right = (gathered(one) if isinstance(one, Vector) and _on(one, side) else one for one in _vectors(score))
    kept = tuple(weight for weight in score.weights if not weight.reads & side)
    return replace(score, weights=kept, left=left, right=right)


def _vectors(score: Score) -> tuple[Vector | Gathered, Vector | Gathered]:
    return score.left, score.right
