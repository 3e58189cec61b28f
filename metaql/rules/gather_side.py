"""The rewrite behind P2B, B2P, B2B and TracIn: the inner product is linear, so sums move to either of its sides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import count

from sqlglot import exp

from metaql.logical import (
    AVG,
    COUNT,
    OUTER,
    STEADY,
    SUM,
    Aggregate,
    Block,
    Column,
    Gather,
    Precondition,
    Scalar,
    Term,
    Vector,
    reads_of,
)
from metaql.scope import Unsure
from metaql.udfs.precondition import MACRO as PRECONDITION


def gather_side(block: Block, side: frozenset[str]) -> Block:
    """Σ ⟨t, v⟩ over T × Q => Σ ⟨t, Σ v over Q⟩ over T; Unsure where this does not hold.

    Q, the ``side``, is a set of the block's relations. What ties it to the others (keys and conditions that read
    columns of both) stays outside, and Q is grouped by the columns of its own that this takes: then each row of a
    group may be replaced by the group. A group's row stands for n of Q, so counts are multiplied with n, averages
    weighted with it, and sums are sums of sums. Q's weights go along with its vectors. A restriction to layers may
    stand on either side of a product, and goes to Q's.

    avg and sum ignore a pair with a NULL anywhere. Whether t (with its weights) is NULL does not depend on v, so
    that on Q's side exactly the rows where nothing of Q is NULL count.
    """
    if block.keys is None or not block.aggregates:
        raise Unsure("there is nothing to aggregate")
    return _Gathering(block, side).block()


@dataclass
class _Gathering:
    old: Block
    side: frozenset[str]
    keys: list[tuple[str, Scalar]] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    tied: bool = False

    def __post_init__(self) -> None:
        taken = {alias.lower() for alias in self.old.aliases}
        self.alias = next(name for name in (f"gathered_{number}" for number in count(1)) if name not in taken)

    def block(self) -> Block:
        inside = tuple(one for one in self.old.conjuncts if self._on(one))
        outside = tuple(self._tie(one) for one in self.old.conjuncts if not self._on(one))
        keys = tuple(self._key(one) for one in self.old.keys or ())
        for output in self.old.outputs:
            if output.reads & self.side:
                raise Unsure(f"{output.sql.sql('duckdb')} is neither aggregated nor a key")
        aggregates = tuple(self._aggregate(one) for one in self.old.aggregates)
        within = tuple(relation for relation in self.old.relations if relation.alias in self.side)
        rest = tuple(relation for relation in self.old.relations if relation.alias not in self.side)
        gather = Gather(self.alias, within, inside, tuple(self.keys), tuple(self.columns), self._guarded())
        renamed = tuple(
            (before, after.sql)
            for before, after in zip(self.old.keys or (), keys, strict=True)
            if before.reads & self.side
        )
        return replace(
            self.old,
            relations=(*rest, gather),
            conjuncts=outside,
            keys=keys,
            aggregates=aggregates,
            renamed=(*self._renamed_before(renamed), *renamed),
        )

    def _renamed_before(self, now: tuple[tuple[Scalar, exp.Expr], ...]) -> tuple[tuple[Scalar, exp.Expr], ...]:
        """What an earlier gathering renamed, and this one again."""
        again = {id(before.sql): after for before, after in now}
        return tuple((before, again.get(id(after), after)) for before, after in self.old.renamed)

    def _guarded(self) -> bool:
        """Whether groups must vanish when Q has no row; the sums of nothing are NULL by themselves."""
        unaware = any(not one.reads & self.side and (one.terms or one.argument) for one in self.old.aggregates)
        return not self.keys and (bool(self.old.keys) or unaware)

    def _tie(self, conjunct: Scalar) -> Scalar:
        return self._split(conjunct) if conjunct.reads & self.side else conjunct

    def _key(self, key: Scalar) -> Scalar:
        if self._on(key):
            return Scalar(self._grouped_by(key), frozenset([self.alias]))
        return self._split(key) if key.reads & self.side else key

    def _split(self, mixed: Scalar) -> Scalar:
        """An expression over both sides, its columns of Q taken from the group."""
        if mixed.sql.find(exp.Query):
            raise Unsure("a sub-query ties the sides together")
        if any(not column.table for column in mixed.sql.find_all(exp.Column)):
            raise Unsure(f"{mixed.sql.sql('duckdb')} does not say whose columns it reads")
        self.tied = True

        def from_group(node: exp.Expr) -> exp.Expr:
            if isinstance(node, exp.Column) and self._owner(node) in self.side:
                return self._grouped_by(Scalar(node, frozenset([self._owner(node)])))
            return node

        return Scalar(mixed.sql.copy().transform(from_group), (mixed.reads - self.side) | {self.alias})

    def _owner(self, column: exp.Column) -> str:
        return next((one for one in self.old.aliases if one.lower() == column.table.lower()), OUTER)

    def _grouped_by(self, key: Scalar) -> exp.Expr:
        for name, known in self.keys:
            if known.sql == key.sql:
                return exp.column(name, self.alias)
        name = f"key_{len(self.keys) + 1}"
        self.keys.append((name, key))
        return exp.column(name, self.alias)

    def _aggregate(self, old: Aggregate) -> Aggregate:
        if old.function == STEADY:
            return self._steady(old)
        present = self._present(old)
        if old.is_vector and old.function == AVG and self._uneven:
            raise Unsure("an average of gradients whose rows count differently often")
        if old.function == COUNT:
            terms = tuple(self._rest(term) for term in old.terms)
        else:
            terms = tuple(self._term(term, old.function, present) for term in old.terms)
        return self._weighted(old, replace(old, terms=terms), present)

    def _present(self, aggregate: Aggregate) -> tuple[Scalar, ...]:
        """What must not be NULL in a row of Q for it to count."""
        parts: list[Scalar] = []
        for term in aggregate.terms:
            for part in term.parts:
                patterns = part.patterns if isinstance(part, Vector) else ()
                found = [Scalar(part.sql, part.reads)] if self._on(part) else []
                found += [pattern for pattern in patterns if pattern.reads & self.side]
                parts += [one for one in found if one not in parts]
        return tuple(parts)

    def _rest(self, term: Term) -> Term:
        """The term without what reads the side: whether it is NULL is all that a count asks."""
        scalars = (Scalar(part.sql, part.reads) for part in term.parts if not self._on(part))
        return Term(tuple(scalars))

    def _weighted(self, old: Aggregate, new: Aggregate, present: tuple[Scalar, ...]) -> Aggregate:
        """How often each row counts, where that is not in the terms."""
        if new.function == AVG and not self._uneven:
            return replace(new, touched=old.touched or bool(present))
        if new.function == SUM and present:
            return replace(new, touched=True)
        many = self._column(Column("", COUNT, present=present))
        if self._uneven or (new.function == COUNT and present):
            return replace(new, weights=(*new.weights, many), touched=True)
        return replace(new, scales=(*new.scales, many), touched=True)

    @property
    def _uneven(self) -> bool:
        """Whether groups of Q with different numbers of rows meet in one group of the query."""
        return self.tied

    def _steady(self, old: Aggregate) -> Aggregate:
        assert old.argument is not None
        if not old.argument.reads & self.side:
            return old
        if not self._on(old.argument):
            raise Unsure(f"{old.place.sql('duckdb')} reads both sides")
        distinct = isinstance(old.argument.sql, exp.Count)
        if distinct and (self.keys or self.tied):
            raise Unsure("count(DISTINCT …) over groups of a gathered side")
        column = self._column(Column("", STEADY, argument=old.argument))
        function = exp.AnyValue if distinct else type(old.argument.sql)
        return replace(old, argument=Scalar(function(this=column.sql), column.reads), touched=True)

    def _term(self, term: Term, function: str, present: tuple[Scalar, ...]) -> Term:
        inside = tuple(factor for factor in term.factors if self._on(factor))
        outside = tuple(factor for factor in term.factors if not self._on(factor))
        vectors, patterns, gathered = self._vectors(term.vectors)
        if len(gathered) == 2:
            # A product within the side is a number like any other there.
            inside = (*inside, _product(gathered))
            gathered = ()
        if gathered:
            vector = replace(gathered[0], patterns=patterns)
            column = self._column(Column("", function, (Term(inside, (vector,)),), present))
            return Term(outside, (*vectors, Vector(column.sql, column.reads)))
        if inside:
            return Term((*outside, self._column(Column("", function, (Term(inside),), present))), vectors)
        if function == SUM and present:
            return Term((*outside, self._column(Column("", COUNT, present=present))), vectors)
        return Term(outside, vectors)

    def _vectors(
        self, vectors: tuple[Vector, ...]
    ) -> tuple[tuple[Vector, ...], tuple[Scalar, ...], tuple[Vector, ...]]:
        """(those outside, the patterns for the one inside, those inside)."""
        inside = tuple(vector for vector in vectors if vector.reads & self.side)
        outside = tuple(vector for vector in vectors if not vector.reads & self.side)
        for vector in inside:
            if not vector.reads <= self.side:
                raise Unsure(f"{vector.sql.sql('duckdb')} is a gradient of both sides")
        if len(inside) != 1:
            if any(vector.all_reads & self.side for vector in outside) or any(
                not vector.all_reads <= self.side for vector in inside
            ):
                raise Unsure("a restriction to layers ties the sides together")
            return outside, (), inside
        patterns = [pattern for vector in vectors for pattern in vector.patterns]
        if any(pattern.reads & self.side and not pattern.reads <= self.side for pattern in patterns):
            raise Unsure("a restriction to layers reads both sides")
        here = tuple(pattern for pattern in patterns if pattern.reads <= self.side)
        there = tuple(pattern for pattern in patterns if not pattern.reads <= self.side)
        if there and not outside:
            raise Unsure("a restriction to layers reads the other side")
        return tuple(replace(vector, patterns=there) for vector in outside), here, inside

    def _on(self, part: Scalar | Vector) -> bool:
        """Whether it reads the side; Unsure if other relations as well. A vector is judged with its patterns."""
        reads = part.reads if isinstance(part, Vector) else reads_of(part)
        if isinstance(part, Scalar) and reads & self.side and not reads <= self.side:
            if part in self.old.conjuncts or part in (self.old.keys or ()):
                return False
            raise Unsure(f"{part.sql.sql('duckdb')} reads both sides")
        return bool(reads & self.side)

    def _column(self, column: Column) -> Scalar:
        for known in self.columns:
            if replace(known, name="") == column:
                return Scalar(exp.column(known.name, self.alias), frozenset([self.alias]))
        name = f"{'count' if column.function == COUNT else column.function}_{len(self.columns) + 1}"
        self.columns.append(replace(column, name=name))
        return Scalar(exp.column(name, self.alias), frozenset([self.alias]))


def _product(vectors: tuple[Vector, ...]) -> Scalar:
    sides = [restricted(vector) for vector in vectors]
    reads = frozenset().union(*(vector.all_reads for vector in vectors))
    return Scalar(exp.Anonymous(this="inner_product", expressions=sides), reads)


def restricted(vector: Vector) -> exp.Expr:
    """The vector as SQL, with its restrictions."""
    return applied(vector.sql.copy(), vector.precondition, vector.patterns)


def applied(sql: exp.Expr, precondition: Precondition | None, patterns: tuple[Scalar, ...]) -> exp.Expr:
    """A gradient preconditioned, and then restricted."""
    if precondition is not None:
        arguments = [one.copy() for one in precondition.arguments]
        sql = exp.Anonymous(this=PRECONDITION, expressions=[sql, *arguments])
    for pattern in patterns:
        sql = exp.Anonymous(this="layers", expressions=[sql, pattern.sql.copy()])
    return sql
