"""Gradients as values: avg, sum and arithmetic of them, which DuckDB does not know, as calls of our functions."""

from __future__ import annotations

from collections.abc import Iterator

from sqlglot import exp

from metaql.algebra import expand, is_product, precondition_of
from metaql.bind import sum_or_average
from metaql.catalogue import Catalogue
from metaql.compile import emitted, entry, keep_name, product, total, where_present
from metaql.logical import AVG, Aggregate
from metaql.rules.gather_side import applied, restricted
from metaql.scope import VECTOR_FUNCTIONS, Scope, Unsure
from metaql.udfs.aggregates import MEAN
from metaql.udfs.aggregates import SUM as TOTAL

_ARITHMETIC = (exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Neg)


def compile_gradient_aggregates(select: exp.Select, catalogue: Catalogue) -> bool:
    """Turns each avg and sum of gradients in the SELECT into our function over a list; whether there were any.

    FILTER and OVER go to the list, which is a plain aggregate.
    """
    found = [node for node in select.walk() if sum_or_average(node) and node.find_ancestor(exp.Query) is select]
    # Every one of them, so no generator that stops at the first.
    changed = [_compile_gradient_aggregate(node, select, catalogue) for node in found]
    return any(changed)


def compile_gradient_arithmetic(select: exp.Select, catalogue: Catalogue, columns: bool = True) -> bool:
    """Turns w·g, g/w, g + h and -g into our function over a list; products of such sums into sums of products.

    ⟨g/w, h⟩ is ⟨g, h⟩/w: no vector is made for each row. Without ``columns`` these are known to be numbers.
    """
    found = [
        node for node in select.walk() if isinstance(node, _ARITHMETIC) and node.find_ancestor(exp.Query) is select
    ]
    if not any(_may_be_vector(operand, columns) for node in found for operand in node.iter_expressions()):
        return False
    try:
        scope = Scope(select, catalogue, joins=False)
    except Unsure:
        return False
    outermost = list(_outermost(select, scope))
    for node in outermost:
        keep_name(select, node)
        node.replace(_product(node, scope) if is_product(node) else _combination(node, scope))
    return bool(outermost)


def _may_be_vector(operand: exp.Expr, columns: bool) -> bool:
    while isinstance(operand, exp.Paren):
        operand = operand.this
    if isinstance(operand, exp.Anonymous):
        return operand.name.lower() in VECTOR_FUNCTIONS
    if isinstance(operand, exp.Column):
        return columns
    return isinstance(operand, exp.Subquery | exp.Case | exp.Coalesce)


def _outermost(select: exp.Select, scope: Scope) -> Iterator[exp.Expr]:
    """Products with arithmetic in an argument, and what arithmetic is left outside of products."""
    pending = list(select.iter_expressions())
    while pending:
        node = pending.pop()
        if isinstance(node, exp.Query):
            continue
        if (is_product(node) and any(_is_combination(one, scope) for one in node.expressions)) or _is_combination(
            node, scope
        ):
            yield node
        else:
            pending.extend(node.iter_expressions())


def _is_combination(node: exp.Expr, scope: Scope) -> bool:
    while isinstance(node, exp.Paren):
        node = node.this
    return isinstance(node, _ARITHMETIC) and scope.is_vector(node)


def _product(node: exp.Expr, scope: Scope) -> exp.Expr:
    try:
        return exp.paren(total(expand(node, scope)))
    except Unsure:
        arguments = [_combination(one, scope) if _is_combination(one, scope) else one for one in node.expressions]
        return exp.Anonymous(this=node.name, expressions=arguments)


def _combination(node: exp.Expr, scope: Scope) -> exp.Expr:
    """Σ weight·vector; NULL where one of the vectors or weights is."""
    try:
        terms = expand(node, scope)
    except Unsure:
        return node.copy()
    if any(len(term.vectors) != 1 for term in terms):
        return node.copy()
    weighted = [(restricted(term.vectors[0]), product(one.sql.copy() for one in term.factors)) for term in terms]
    call = exp.Anonymous(this=TOTAL, expressions=[exp.Array(expressions=[entry(*one) for one in weighted])])
    return where_present([part for one in weighted for part in one], call) if len(weighted) > 1 else call


def _compile_gradient_aggregate(node: exp.Expr, select: exp.Select, catalogue: Catalogue) -> bool:
    function, argument = sum_or_average(node) or (AVG, node)
    found = _weighted_vector(argument, select, catalogue)
    if found is None:
        return _compile_sum(node, function, argument, select, catalogue)
    keep_name(select, node)
    outer = node
    while isinstance(outer.parent, exp.Filter | exp.Window) and outer.arg_key == "this":
        outer = outer.parent
    call = exp.Anonymous(this=MEAN if function == AVG else TOTAL)
    weights, vector, distinct = found
    precondition = None if distinct else precondition_of(vector)
    # P is linear, so that it is computed once for all.
    outer.replace(applied(call, precondition, ()))
    vector = vector if precondition is None else vector.expressions[0]
    values: exp.Expr = entry(vector, product(one.copy() for one in weights))
    values = exp.ArrayAgg(this=exp.Distinct(expressions=[values]) if distinct else values)
    if outer is not node:
        node.replace(values)
        values = outer
    call.set("expressions", [values])
    return True


def _compile_sum(node: exp.Expr, function: str, argument: exp.Expr, select: exp.Select, catalogue: Catalogue) -> bool:
    """avg and sum of a linear combination of several gradients; whether it was one."""
    if isinstance(node.parent, exp.Filter | exp.Window) or not argument.find(exp.Add, exp.Sub):
        return False
    try:
        terms = expand(argument, Scope(select, catalogue, joins=False))
    except Unsure:
        return False
    if any(len(term.vectors) != 1 for term in terms):
        return False
    keep_name(select, node)
    node.replace(emitted(Aggregate(function, terms, node)))
    return True


def _weighted_vector(
    argument: exp.Expr, select: exp.Select, catalogue: Catalogue
) -> tuple[list[exp.Expr], exp.Expr, bool] | None:
    """(weights, gradient, whether DISTINCT) of a product with one gradient in it; None for any other."""
    distinct = isinstance(argument, exp.Distinct)
    parts = list(_factors(argument.expressions[0] if distinct else argument))
    vectors = [part for part in parts if catalogue.is_gradient(part, select)]
    if len(vectors) != 1:
        return None
    return [part for part in parts if part is not vectors[0]], vectors[0], distinct


def _factors(node: exp.Expr) -> Iterator[exp.Expr]:
    """The factors of a product; a minus is one, and so is a number that it is divided by."""
    if isinstance(node, exp.Paren):
        yield from _factors(node.this)
    elif isinstance(node, exp.Neg):
        yield exp.Literal.number("-1")
        yield from _factors(node.this)
    elif isinstance(node, exp.Div):
        yield from _factors(node.left)
        one = exp.cast(exp.Literal.number(1), "DOUBLE")
        yield exp.Div(this=one, expression=exp.paren(node.right.copy()))
    elif isinstance(node, exp.Mul):
        yield from _factors(node.left)
        yield from _factors(node.right)
    else:
        yield node
