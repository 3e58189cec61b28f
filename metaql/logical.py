"""What the rules see of a query: which relations it joins, and which gradient algebra it does over them.

A ``Block`` is one SELECT. Its nodes hold syntax trees, but no rule looks into these: a node says which of the
block's relations it reads, and that is what the rules go by. A name of a query further outside is read from
``OUTER``, which is part of every side but one that is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlglot import exp

AVG = "avg"
SUM = "sum"
COUNT = "count"
# min, max and whatever else stays the same when every row of a group comes k times.
STEADY = "steady"
# A group of one row: what it yields is what is computed of that row.
EACH = "each"
EACH_COUNT = "each count"
OUTER = ""


@dataclass(frozen=True)
class Scalar:
    """An expression, and the aliases of the relations that it reads."""

    sql: exp.Expr = field(repr=False)
    reads: frozenset[str]


@dataclass(frozen=True)
class Precondition:
    """A call of precondition(…), which is linear: its ``arguments`` behind the gradient, which read no relation."""

    arguments: tuple[exp.Expr, ...] = field(repr=False)
    symmetric: bool = True


@dataclass(frozen=True)
class Vector:
    """An expression that yields a gradient, and the aliases of the relations that it reads.

    ``patterns`` are restrictions to layers, taken off the expression: they can stand on either side of a product.
    ``precondition`` was taken off under them.
    """

    sql: exp.Expr = field(repr=False)
    reads: frozenset[str]
    patterns: tuple[Scalar, ...] = ()
    precondition: Precondition | None = None

    @property
    def all_reads(self) -> frozenset[str]:
        """What the vector and its restrictions read."""
        return self.reads.union(*(pattern.reads for pattern in self.patterns))


@dataclass(frozen=True)
class Term:
    """A product of numbers and, with two vectors, their inner product; with one it is a vector itself."""

    factors: tuple[Scalar, ...]
    vectors: tuple[Vector, ...] = ()

    @property
    def parts(self) -> tuple[Scalar | Vector, ...]:
        """Everything that is multiplied."""
        return (*self.factors, *self.vectors)


@dataclass(frozen=True)
class Aggregate:
    """avg, sum or count of a sum of terms over the rows of a group, EACH, or a STEADY function of its ``argument``.

    A row may stand for several of the query as it was written: its ``weights``, multiplied, say for how many that
    are not NULL. Those of ``scales`` are the same for a whole group. ``place`` is the aggregate in the syntax tree.
    """

    function: str
    terms: tuple[Term, ...]
    place: exp.Expr = field(repr=False, compare=False)
    argument: Scalar | None = None
    weights: tuple[Scalar, ...] = ()
    scales: tuple[Scalar, ...] = ()
    touched: bool = False

    @property
    def is_score(self) -> bool:
        """Whether there is an inner product in it."""
        return any(len(term.vectors) == 2 for term in self.terms)

    @property
    def is_vector(self) -> bool:
        """Whether the result is a gradient."""
        return any(len(term.vectors) == 1 for term in self.terms)

    @property
    def reads(self) -> frozenset[str]:
        """All relations that it reads."""
        return frozenset().union(
            *(reads_of(part) for term in self.terms for part in term.parts),
            *(scalar.reads for scalar in (*self.weights, *self.scales)),
            self.argument.reads if self.argument else frozenset(),
        )


@dataclass(frozen=True)
class Relation:
    """One item of FROM under its alias; ``unique`` columns tell its rows apart, where that is known."""

    alias: str
    item: exp.Expr = field(repr=False)
    unique: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Column:
    """What a gathered side yields under a name: avg, sum or count over its rows.

    Only rows where all of ``present`` are there count. A STEADY one is its argument's own aggregate. A sum of gradients
    may be preconditioned, and then restricted to layers.
    """

    name: str
    function: str
    terms: tuple[Term, ...] = ()
    present: tuple[Scalar, ...] = ()
    argument: Scalar | None = None
    precondition: Precondition | None = None
    patterns: tuple[Scalar, ...] = ()


@dataclass(frozen=True)
class Gather:
    """Some relations of a block, joined, grouped by ``keys`` and aggregated: a relation again.

    Without keys it has a single row. ``guarded``: none if the relations have no row.
    """

    alias: str
    relations: tuple[Relation | Gather, ...]
    conjuncts: tuple[Scalar, ...]
    keys: tuple[tuple[str, Scalar], ...]
    columns: tuple[Column, ...]
    guarded: bool


@dataclass(frozen=True)
class Block:
    """One SELECT with its aggregates taken out.

    ``keys`` are what it groups by, None for a SELECT that yields a row for each row of its relations; ``outputs``
    is what it computes from the groups' keys. ``renamed`` says how columns of relations that were gathered are
    called now.
    """

    relations: tuple[Relation | Gather, ...]
    conjuncts: tuple[Scalar, ...]
    keys: tuple[Scalar, ...] | None
    aggregates: tuple[Aggregate, ...]
    outputs: tuple[Scalar, ...] = ()
    has_having: bool = False
    renamed: tuple[tuple[Scalar, exp.Expr], ...] = ()

    def __post_init__(self) -> None:
        aliases = [relation.alias for relation in self.relations]
        assert len(set(aliases)) == len(aliases), f"an alias twice: {aliases}"

    @property
    def aliases(self) -> frozenset[str]:
        """The names of its relations."""
        return frozenset(relation.alias for relation in self.relations)

    @property
    def local(self) -> frozenset[str]:
        """The relations whose columns are columns of the query: a side of a single row is a sub-query in its place."""
        single = (one.alias for one in self.gathers() if not one.keys)
        return self.aliases - frozenset(single)

    def gathers(self) -> Iterator[Gather]:
        """Those of its relations that are gathered."""
        yield from (relation for relation in self.relations if isinstance(relation, Gather))


def reads_of(part: Scalar | Vector) -> frozenset[str]:
    """The relations that a part of a term reads."""
    return part.all_reads if isinstance(part, Vector) else part.reads
