"""What the rules see of a query: which relations it joins, and which gradient algebra it does over them.

A ``Block`` is one SELECT. Its nodes hold syntax trees, but no rule looks into these: a node says which of the
block's relations it reads, and that is what the rules go by.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlglot import exp

AVG = "avg"
SUM = "sum"


@dataclass(frozen=True)
class Relation:
    """One item of FROM under its alias."""

    alias: str
    item: exp.Expr = field(repr=False)


@dataclass(frozen=True)
class Scalar:
    """An expression, and the aliases of the relations that it reads."""

    sql: exp.Expr = field(repr=False)
    reads: frozenset[str]


@dataclass(frozen=True)
class Vector:
    """An expression that yields a gradient, and the aliases of the relations that it reads."""

    sql: exp.Expr = field(repr=False)
    reads: frozenset[str]


@dataclass(frozen=True)
class Gathered:
    """avg or sum of weights·vector over the rows of some relations that pass the conjuncts: a vector again."""

    function: str
    weights: tuple[Scalar, ...]
    vector: Vector
    relations: tuple[Relation, ...]
    conjuncts: tuple[Scalar, ...]


@dataclass(frozen=True)
class Score:
    """avg or sum of weights·⟨left, right⟩ over the rows of a group."""

    function: str
    weights: tuple[Scalar, ...]
    left: Vector | Gathered
    right: Vector | Gathered


@dataclass(frozen=True)
class Block:
    """One SELECT with its scores taken out.

    ``others`` is everything else that it computes from its relations' rows, with the group's keys left out; none of
    it changes when every row is repeated the same number of times. ``not_empty`` holds relations that no longer
    multiply the rows, but must still have some for there to be any result.
    """

    relations: tuple[Relation, ...]
    conjuncts: tuple[Scalar, ...]
    keys: tuple[Scalar, ...]
    others: tuple[Scalar, ...]
    scores: tuple[Score, ...]
    not_empty: tuple[tuple[tuple[Relation, ...], tuple[Scalar, ...]], ...] = ()

    def __post_init__(self) -> None:
        aliases = [relation.alias for relation in self.relations]
        assert len(set(aliases)) == len(aliases), f"an alias twice: {aliases}"
        assert self.scores, "a block without scores has nothing to plan"
