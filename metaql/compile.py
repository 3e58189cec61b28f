"""From logical blocks back to SQL that DuckDB runs with our functions."""

from __future__ import annotations

from sqlglot import exp

from metaql.bind import Bound, factors, sum_or_average
from metaql.catalogue import Catalogue
from metaql.logical import AVG, Block, Gathered, Relation, Scalar, Score, Vector
from metaql.parse import to_sql
from metaql.udfs.aggregates import MEAN, SUM


def compile_block(select: exp.Select, bound: Bound, block: Block) -> None:
    """Changes the SELECT that was bound into one that computes the block."""
    for place, score in zip(bound.places, block.scores, strict=True):
        _keep_name(select, place)
        place.replace(_score(score))
    select.set("from_", exp.From(this=block.relations[0].item.copy()))
    select.set("joins", _cross(block.relations[1:]))
    exists = [_exists(relations, conjuncts) for relations, conjuncts in block.not_empty]
    select.set("where", _where([*(one.sql for one in block.conjuncts), *exists]))


def compile_gradient_aggregates(select: exp.Select, catalogue: Catalogue) -> bool:
    """Turns each avg and sum of gradients in the SELECT into our function over a list; whether there were any.

    FILTER and OVER go to the list, which is a plain aggregate.
    """
    found = [node for node in select.walk() if sum_or_average(node) and node.find_ancestor(exp.Query) is select]
    # Every one of them, so no generator that stops at the first.
    changed = [_compile_gradient_aggregate(node, select, catalogue) for node in found]
    return any(changed)


def _compile_gradient_aggregate(node: exp.Expr, select: exp.Select, catalogue: Catalogue) -> bool:
    function, argument = sum_or_average(node) or (AVG, node)
    product = _weighted_vector(argument, select, catalogue)
    if product is None:
        return False
    _keep_name(select, node)
    outer = node
    while isinstance(outer.parent, exp.Filter | exp.Window) and outer.arg_key == "this":
        outer = outer.parent
    call = exp.Anonymous(this=MEAN if function == AVG else SUM)
    outer.replace(call)
    values = _list(*product)
    if outer is not node:
        node.replace(values)
        values = outer
    call.set("expressions", [values])
    return True


def _weighted_vector(
    argument: exp.Expr, select: exp.Select, catalogue: Catalogue
) -> tuple[list[exp.Expr], exp.Expr, bool] | None:
    """(weights, gradient, whether DISTINCT) of a product with one gradient in it; None for any other."""
    distinct = isinstance(argument, exp.Distinct)
    parts = list(factors(argument.expressions[0] if distinct else argument))
    vectors = [part for part in parts if catalogue.is_gradient(part, select)]
    if len(vectors) != 1:
        return None
    return [part for part in parts if part is not vectors[0]], vectors[0], distinct


def _list(weights: list[exp.Expr], vector: exp.Expr, distinct: bool) -> exp.Expr:
    weight: exp.Expr = exp.Literal.number(1)
    for factor in weights:
        weight = exp.Mul(this=weight, expression=exp.paren(factor.copy()))
    entry: exp.Expr = exp.Struct(
        expressions=[
            exp.PropertyEQ(this=exp.to_identifier("gradient"), expression=vector.copy()),
            exp.PropertyEQ(this=exp.to_identifier("weight"), expression=exp.cast(weight, "DOUBLE")),
        ]
    )
    return exp.ArrayAgg(this=exp.Distinct(expressions=[entry]) if distinct else entry)


def _keep_name(select: exp.Select, node: exp.Expr) -> None:
    """A column without an alias is named after its text; it keeps that name when the text changes."""
    for item in select.expressions:
        if not isinstance(item, exp.Alias) and any(one is node for one in item.walk()):
            alias = exp.Alias(alias=exp.to_identifier(to_sql(item, normalize_functions="lower"), quoted=True))
            item.replace(alias)
            alias.set("this", item)


def _score(score: Score) -> exp.Expr:
    total: exp.Expr = exp.Anonymous(this="inner_product", expressions=[_vector(score.left), _vector(score.right)])
    for weight in score.weights:
        total = exp.Mul(this=total, expression=exp.paren(weight.sql.copy()))
    return exp.Avg(this=total) if score.function == AVG else exp.Sum(this=total)


def _vector(vector: Vector | Gathered) -> exp.Expr:
    if isinstance(vector, Vector):
        return vector.sql.copy()
    name = MEAN if vector.function == AVG else SUM
    values = _list([one.sql for one in vector.weights], vector.vector.sql, False)
    query = exp.Select(expressions=[exp.Anonymous(this=name, expressions=[values])])
    return exp.Subquery(this=_from(query, vector.relations, vector.conjuncts))


def _exists(relations: tuple[Relation, ...], conjuncts: tuple[Scalar, ...]) -> exp.Expr:
    return exp.Exists(this=_from(exp.Select(expressions=[exp.Literal.number(1)]), relations, conjuncts))


def _from(query: exp.Select, relations: tuple[Relation, ...], conjuncts: tuple[Scalar, ...]) -> exp.Select:
    query.set("from_", exp.From(this=relations[0].item.copy()))
    query.set("joins", _cross(relations[1:]))
    query.set("where", _where([one.sql for one in conjuncts]))
    return query


def _cross(relations: tuple[Relation, ...]) -> list[exp.Expr]:
    return [exp.Join(this=relation.item.copy(), kind="CROSS") for relation in relations]


def _where(conditions: list[exp.Expr]) -> exp.Where | None:
    return exp.Where(this=exp.and_(*(one.copy() for one in conditions))) if conditions else None
