"""The rewrite that makes a GROUP BY of a sample's key a plain scan."""

from __future__ import annotations

from dataclasses import replace

from sqlglot import exp

from metaql.logical import AVG, EACH, EACH_COUNT, STEADY, SUM, Aggregate, Block, Gather, Relation, Scalar


def drop_groups_of_one_row(block: Block) -> Block | None:
    """avg x GROUP BY k => x, where k tells every row of the relations apart.

    HAVING stays a condition on groups: as one on rows it would compute the scores twice. An aggregate whose type
    might change (the avg of whole numbers is none) keeps its group as well.
    """
    if block.keys is None or block.has_having or not block.aggregates:
        return None
    if not all(_is_told_apart(relation, block) for relation in block.relations):
        return None
    if not all(_keeps_its_type(aggregate) for aggregate in block.aggregates):
        return None
    aggregates = tuple(_each(aggregate) for aggregate in block.aggregates)
    return replace(block, keys=None, aggregates=aggregates)


def _is_told_apart(relation: Relation | Gather, block: Block) -> bool:
    """Whether the keys leave no more than one row of a relation; without keys there must be one in any case."""
    names = {key.sql.name.lower() for key in block.keys or () if _is_column_of(key, relation)}
    if isinstance(relation, Gather):
        if not relation.keys:
            return bool(block.keys) or not relation.guarded
        return {name for name, _ in relation.keys} <= names
    return bool(relation.unique) and relation.unique <= names


def _is_column_of(key: Scalar, relation: Relation | Gather) -> bool:
    return isinstance(key.sql, exp.Column) and key.reads == frozenset([relation.alias])


def _keeps_its_type(aggregate: Aggregate) -> bool:
    if aggregate.function in (AVG, SUM):
        return aggregate.is_score or aggregate.is_vector
    if aggregate.function == STEADY:
        assert aggregate.argument is not None
        call = aggregate.argument.sql
        # max(x, 3) is a list.
        plain = not call.expressions and call.args.get("count") is None
        return plain and isinstance(call, exp.Min | exp.Max | exp.AnyValue)
    return True


def _each(aggregate: Aggregate) -> Aggregate:
    if aggregate.function == STEADY:
        assert aggregate.argument is not None
        inner = aggregate.argument.sql.this
        return replace(aggregate, function=EACH, argument=Scalar(inner, aggregate.argument.reads), touched=True)
    if aggregate.function in (AVG, SUM):
        weights = () if aggregate.function == AVG else aggregate.weights
        return replace(aggregate, function=EACH, weights=weights, touched=True)
    return replace(aggregate, function=EACH_COUNT, touched=True)
