"""From logical blocks back to SQL that DuckDB runs with our functions."""

from __future__ import annotations

from collections.abc import Iterable

from sqlglot import exp

from metaql.catalogue import Catalogue, visible_ctes, without_parameters
from metaql.logical import (
    AVG,
    COUNT,
    EACH,
    EACH_COUNT,
    STEADY,
    SUM,
    Aggregate,
    Block,
    Column,
    Gather,
    Relation,
    Scalar,
    Term,
    Vector,
)
from metaql.parse import name_of_output, standing_for
from metaql.rules.gather_side import applied, restricted
from metaql.scope import Scope, name_of
from metaql.stats import Count
from metaql.udfs.aggregates import MEAN
from metaql.udfs.aggregates import SUM as TOTAL
from metaql.udfs.score import SCORE


def compile_block(scope: Scope, block: Block, expected: Count) -> None:
    """Changes the SELECT that was bound into one that computes the block.

    ``expected``: how many products each gathered vector is in.
    """
    select = scope.select
    _rename(scope, block)
    for aggregate in block.aggregates:
        if aggregate.touched or aggregate.is_vector or block.keys is None:
            keep_name(select, aggregate.place)
            aggregate.place.replace(emitted(aggregate))
    gathered = {gather.alias for gather in block.gathers()}
    for product_ in list(select.find_all(exp.Anonymous)):
        vectors = product_.expressions
        if name_of(product_) == "inner_product" and any(
            isinstance(one, exp.Column) and one.table in gathered for one in vectors
        ):
            product_.replace(scored(vectors[0], vectors[1], expected))
    keyed = [one for one in block.relations if isinstance(one, Relation) or one.keys]
    exists = [_exists(one) for one in block.gathers() if one.guarded]
    read_from(select, map(_item, keyed), [*(one.sql for one in block.conjuncts), *exists])
    if block.keys is None:
        select.set("group", None)
    for gather in block.gathers():
        if not gather.keys:
            _in_place(select, gather)


def scored(left: exp.Expr, right: exp.Expr, expected: Count) -> exp.Expr:
    """The inner product of a vector on the left with one on the right that many others are multiplied with."""
    if expected.value is None:
        return exp.Anonymous(this="inner_product", expressions=[left.copy(), right.copy()])
    rows = exp.Literal.number(f"{max(expected.value, 1):.0f}")
    return exp.Anonymous(this=SCORE, expressions=[left.copy(), right.copy(), rows])


def emitted(aggregate: Aggregate) -> exp.Expr:
    """An aggregate as SQL."""
    if aggregate.function in (STEADY, EACH) and aggregate.argument is not None:
        return aggregate.argument.sql.copy()
    if aggregate.function in (COUNT, EACH_COUNT):
        return _count(aggregate)
    if aggregate.is_vector:
        return _vector_aggregate(aggregate)
    value = total(aggregate.terms)
    if aggregate.function == EACH:
        whole = product([value, *_sqls(aggregate.weights), *_sqls(aggregate.scales)])
        return whole if isinstance(whole, exp.Func) else exp.paren(whole)
    if not aggregate.weights:
        plain: exp.Expr = exp.Avg(this=value) if aggregate.function == AVG else exp.Sum(this=value)
        return _scaled(plain, aggregate.scales)
    weight = product(_sqls(aggregate.weights))
    weighted = exp.Sum(this=product([value, exp.paren(weight)]))
    if aggregate.function == SUM:
        return _scaled(weighted, aggregate.scales)
    there = exp.Not(this=exp.Is(this=exp.paren(value.copy()), expression=exp.Null()))
    many = exp.Sum(this=exp.Case(ifs=[exp.If(this=there, true=weight.copy())]))
    return exp.paren(exp.Div(this=weighted, expression=many))


def _count(aggregate: Aggregate) -> exp.Expr:
    """Rows that the query would have had, of which one here stands for several."""
    if aggregate.function == EACH_COUNT:
        return _whole(_where_all_present(aggregate, product([*_sqls(aggregate.weights), *_sqls(aggregate.scales)])))
    if not aggregate.weights:
        return _whole(_scaled(aggregate.place.copy(), aggregate.scales))
    counted = _scaled(exp.Sum(this=_where_all_present(aggregate, product(_sqls(aggregate.weights)))), aggregate.scales)
    return _whole(counted)


def _where_all_present(aggregate: Aggregate, value: exp.Expr) -> exp.Expr:
    parts = [part.sql for term in aggregate.terms for part in term.parts]
    return where_present(parts, value) if parts else value


def _whole(number: exp.Expr) -> exp.Expr:
    """A count: 0 where there is nothing to count."""
    return exp.cast(exp.Coalesce(this=number, expressions=[exp.Literal.number(0)]), "BIGINT")


def _vector_aggregate(aggregate: Aggregate) -> exp.Expr:
    """avg and sum of gradients, as functions over lists; of a sum of terms, the sum of theirs."""
    first = aggregate.terms[0]
    scales = [*aggregate.weights, *aggregate.scales]
    if aggregate.function == EACH and len(aggregate.terms) == 1 and not first.factors and not scales:
        return restricted(first.vectors[0])
    # A row counts only where nothing in it is NULL.
    present = [part.sql for term in aggregate.terms for part in term.parts] if len(aggregate.terms) > 1 else []
    entries = [_entry([*term.factors, *scales], term.vectors[0], present) for term in aggregate.terms]
    if aggregate.function == EACH:
        whole = exp.Anonymous(this=TOTAL, expressions=[exp.Array(expressions=entries)])
        return where_present(present, whole) if present else whole
    name = MEAN if aggregate.function == AVG else TOTAL
    lists = [exp.Anonymous(this=name, expressions=[exp.ArrayAgg(this=one)]) for one in entries]
    if len(lists) == 1:
        return lists[0]
    return exp.Anonymous(
        this=TOTAL, expressions=[exp.Array(expressions=[entry(one, exp.Literal.number(1)) for one in lists])]
    )


def _scaled(value: exp.Expr, scales: tuple[Scalar, ...]) -> exp.Expr:
    """A group's result times numbers that are the same in all its rows."""
    if not scales:
        return value
    return exp.paren(product([value, *(exp.AnyValue(this=scale.copy()) for scale in _sqls(scales))]))


def total(terms: tuple[Term, ...]) -> exp.Expr:
    first, *others = [_term(term) for term in terms]
    for value in others:
        first = exp.Add(this=first, expression=value)
    return first


def _term(term: Term) -> exp.Expr:
    parts: list[exp.Expr] = []
    if term.vectors:
        parts.append(exp.Anonymous(this="inner_product", expressions=[restricted(one) for one in term.vectors]))
    return product([*parts, *_sqls(term.factors)])


def product(parts: Iterable[exp.Expr]) -> exp.Expr:
    parts = [
        part if isinstance(part, exp.Literal | exp.Column | exp.Func | exp.Paren) else exp.paren(part) for part in parts
    ]
    if not parts:
        return exp.Literal.number(1)
    if len(parts) == 1 and isinstance(parts[0], exp.Paren):
        inner: exp.Expr = parts[0].this
        return inner
    first, *others = parts
    for part in others:
        first = exp.Mul(this=first, expression=part)
    return first


def _sqls(scalars: Iterable[Scalar]) -> list[exp.Expr]:
    return [scalar.sql.copy() for scalar in scalars]


def where_present(parts: Iterable[exp.Expr], value: exp.Expr) -> exp.Expr:
    known = (part for part in parts if not isinstance(part, exp.Literal))
    tests = [exp.Not(this=exp.Is(this=exp.paren(part.copy()), expression=exp.Null())) for part in known]
    return exp.Case(ifs=[exp.If(this=exp.and_(*tests), true=value)])


# Gathered sides


def _item(relation: Relation | Gather) -> exp.Expr:
    if isinstance(relation, Relation):
        return relation.item
    query = _gathered(relation, [_named(key.sql.copy(), name) for name, key in relation.keys] + _columns(relation))
    query.set("group", exp.Group(expressions=[key.sql.copy() for _, key in relation.keys]))
    return exp.Subquery(this=query, alias=exp.TableAlias(this=exp.to_identifier(relation.alias)))


def _columns(gather: Gather) -> list[exp.Expr]:
    return [_named(_column(column), column.name) for column in gather.columns]


def _named(sql: exp.Expr, name: str) -> exp.Expr:
    return exp.Alias(this=sql, alias=exp.to_identifier(name))


def _gathered(gather: Gather, expressions: list[exp.Expr]) -> exp.Select:
    query = exp.Select(expressions=expressions)
    return read_from(query, map(_item, gather.relations), [one.sql for one in gather.conjuncts])


def _column(column: Column) -> exp.Expr:
    if column.function == STEADY:
        assert column.argument is not None
        return column.argument.sql.copy()
    if column.function == COUNT:
        counted: exp.Expr = exp.Star()
        if column.present:
            counted = where_present([one.sql for one in column.present], exp.Literal.number(1))
        return exp.Count(this=counted, big_int=True)
    (term,) = column.terms
    own = [part.sql for part in term.parts]
    others = [one.sql for one in column.present if one.sql not in own]
    if term.vectors:
        entry = _entry(list(term.factors), term.vectors[0], others)
        name = MEAN if column.function == AVG else TOTAL
        summed = exp.Anonymous(this=name, expressions=[exp.ArrayAgg(this=entry)])
        return applied(summed, column.precondition, column.patterns)
    value = product(_sqls(term.factors))
    value = where_present(others, value) if others else value
    return exp.Avg(this=value) if column.function == AVG else exp.Sum(this=value)


def _entry(weights: list[Scalar], vector: Vector, present: Iterable[exp.Expr]) -> exp.Expr:
    """What the aggregate functions over lists take: a gradient, and its weight (NULL for one that does not count)."""
    weight = exp.Literal.number(1) if not weights else product(_sqls(weights))
    present = list(present)
    weight = where_present(present, weight) if present else weight
    return entry(restricted(vector), weight)


def entry(vector: exp.Expr, weight: exp.Expr) -> exp.Expr:
    """{gradient: …, weight: …}."""
    return exp.Struct(
        expressions=[
            exp.PropertyEQ(this=exp.to_identifier("gradient"), expression=vector.copy()),
            exp.PropertyEQ(this=exp.to_identifier("weight"), expression=exp.cast(weight.copy(), "DOUBLE")),
        ]
    )


def _in_place(select: exp.Select, gather: Gather) -> None:
    """A side of a single row is a scalar sub-query wherever its columns stand; DuckDB runs equal ones once."""
    columns = {column.name: column for column in gather.columns}
    for node in list(select.find_all(exp.Column)):
        if node.table == gather.alias:
            query = _gathered(gather, [_column(columns[node.name])])
            node.replace(exp.Subquery(this=query))


def _exists(gather: Gather) -> exp.Expr:
    return exp.Exists(this=_gathered(gather, [exp.Literal.number(1)]))


def read_from(select: exp.Select, items: Iterable[exp.Expr], conditions: list[exp.Expr]) -> exp.Select:
    """The SELECT, which now reads these items, all of them joined, under all of these conditions.

    Of what is part of another tree it has a copy.
    """
    items = [item.copy() if item.parent else item for item in items]
    select.set("from_", exp.From(this=items[0]) if items else None)
    select.set("joins", [exp.Join(this=item, kind="CROSS") for item in items[1:]])
    select.set("where", exp.Where(this=exp.and_(*conditions)) if conditions else None)
    return select


# Names


def _rename(scope: Scope, block: Block) -> None:
    """Keys of a gathered side are called otherwise now, wherever they stand outside aggregates."""
    select = scope.select
    names = {scope.canonical(before.sql): after for before, after in block.renamed}
    if not names:
        return
    places = {id(one.place) for one in block.aggregates}
    group = select.args.get("group")
    if group is not None and not group.args.get("all"):
        keys = block.keys if block.keys is not None else ()
        group.set("expressions", [key.sql.copy() for key in keys])
    pending = [
        child
        for part in ("expressions", "having", "qualify", "order")
        for child in (select.args[part] if part == "expressions" else [select.args.get(part)])
        if child is not None
    ]
    while pending:
        node = pending.pop()
        if id(node) in places or scope.is_alias(node):
            continue
        after = names.get(scope.canonical(node)) if isinstance(node, exp.Condition) else None
        if after is not None:
            keep_name(select, node)
            node.replace(standing_for(after.copy(), node))
        else:
            pending.extend(node.iter_expressions())


def name_outputs(select: exp.Select, written: exp.Select | str, catalogue: Catalogue) -> None:
    """Columns that have no name of their own get the one that DuckDB would give them, where it can say."""
    if all(isinstance(item, exp.Alias | exp.Column) or "named" in item.meta for item in select.expressions):
        return
    text = written if isinstance(written, str) else visible_ctes(select) + without_parameters(written)
    columns = catalogue.ask(text)
    if columns is not None and len(columns) == len(select.expressions):
        for item, (name, _) in zip(select.expressions, columns, strict=True):
            item.meta.update(text=name, named=True)


def keep_name(select: exp.Select, node: exp.Expr) -> None:
    """A column without an alias is named after its text; it keeps that name when the text changes."""
    for item in select.expressions:
        if not isinstance(item, exp.Alias) and any(one is node for one in item.walk()):
            alias = exp.Alias(alias=exp.to_identifier(name_of_output(item), quoted=True))
            item.replace(alias)
            alias.set("this", item)
