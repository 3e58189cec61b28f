"""The rewrite that makes influence functions cost one preconditioned gradient a query side."""

from __future__ import annotations

from dataclasses import replace

from sqlglot import exp

from metaql.logical import AVG, SUM, Aggregate, Block, Column, Gather, Precondition, Scalar, Term, Vector


def precondition_sums(block: Block) -> Block | None:
    """Σ P v over Q => P Σ v over Q, and ⟨P t, Σ v⟩ => ⟨t, P Σ v⟩, for each gathered Q.

    P, the inverse of a symmetric curvature, is linear, and symmetric but for one way to compute it. A restriction to
    layers does not commute with it: one of the sum, ⟨t, R P v⟩, is taken out as well if it is the same for all, and one
    of t leaves ⟨R P t, Σ v⟩ be.
    """
    sums = {one.alias: _taken_out(one) for one in block.gathers()}
    aggregates = tuple(_moved(one, sums) for one in block.aggregates)
    read = _read(aggregates)
    now = {old.alias: _without_unread(sums[old.alias], old, read) for old in block.gathers()}
    relations = tuple(now.get(one.alias, one) for one in block.relations)
    changed = replace(block, relations=relations, aggregates=aggregates)
    return None if changed == block else changed


def _read(aggregates: tuple[Aggregate, ...]) -> set[tuple[str, str]]:
    """The columns that aggregates read, each with its relation."""
    parts: list[Scalar | Vector] = [part for one in aggregates for term in one.terms for part in term.parts]
    parts += [part for one in aggregates for part in (*one.weights, *one.scales)]
    parts += [one.argument for one in aggregates if one.argument is not None]
    return {(column.table, column.name) for part in parts for column in part.sql.find_all(exp.Column)}


def _without_unread(now: Gather, before: Gather, read: set[tuple[str, str]]) -> Gather:
    """The side as it is now, without the sums that were moved away from."""
    if len(now.columns) == len(before.columns):
        return now
    return replace(now, columns=tuple(one for one in now.columns if (now.alias, one.name) in read))


def _taken_out(gather: Gather) -> Gather:
    inner = tuple(_taken_out(one) if isinstance(one, Gather) else one for one in gather.relations)
    return replace(gather, relations=inner, columns=tuple(map(_outside, gather.columns)))


def _outside(column: Column) -> Column:
    if column.function not in (AVG, SUM) or len(column.terms) != 1 or len(column.terms[0].vectors) != 1:
        return column
    (term,) = column.terms
    (vector,) = term.vectors
    if vector.precondition is None or any(pattern.reads for pattern in vector.patterns):
        return column
    bare = replace(vector, precondition=None, patterns=())
    terms = (replace(term, vectors=(bare,)),)
    return replace(column, terms=terms, precondition=vector.precondition, patterns=vector.patterns)


def _moved(aggregate: Aggregate, sums: dict[str, Gather]) -> Aggregate:
    return replace(aggregate, terms=tuple(_to_sum(term, sums) for term in aggregate.terms))


def _to_sum(term: Term, sums: dict[str, Gather]) -> Term:
    """⟨P t, Σ v⟩ => ⟨t, P Σ v⟩."""
    for own, other in (term.vectors, term.vectors[::-1]) if len(term.vectors) == 2 else ():
        known = _column(other, sums)
        if own.precondition is None or not own.precondition.symmetric or own.patterns or known is None:
            continue
        gather, column = known
        moved = _preconditioned(column, own.precondition, gather)
        if moved not in gather.columns:
            sums[gather.alias] = replace(gather, columns=(*gather.columns, moved))
        sql = exp.column(moved.name, gather.alias)
        pair = {id(own): replace(own, precondition=None), id(other): replace(other, sql=sql)}
        return replace(term, vectors=tuple(pair[id(one)] for one in term.vectors))
    return term


def _column(vector: Vector, sums: dict[str, Gather]) -> tuple[Gather, Column] | None:
    """The sum that a vector is, if nothing is done to it yet, and where it is gathered."""
    column = vector.sql
    if not isinstance(column, exp.Column) or column.table not in sums or vector.precondition or vector.patterns:
        return None
    gather = sums[column.table]
    found = next(one for one in gather.columns if one.name == column.name)
    return None if found.precondition or found.patterns else (gather, found)


def _preconditioned(column: Column, precondition: Precondition, gather: Gather) -> Column:
    changed = replace(column, precondition=precondition)
    known = next((one for one in gather.columns if replace(one, name=column.name) == changed), None)
    return known or replace(changed, name=f"{column.name}_{len(gather.columns) + 1}")
