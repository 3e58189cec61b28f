"""All pairs of two relations: one is read a chunk at a time, the other stands beside it in lists of gradients.

DuckDB hands a cross product to a function as single pairs, of which looking up the rows is most of the cost. With
some hundreds of gradients behind one number, a call is a product of matrices, and DuckDB unnests its result.

    FROM t, v                         FROM (SELECT t.…, unnest(members) AS member, unnest(scores(t.g, list)) AS score
    … inner_product(t.g, v.g) …  =>         FROM t, (SELECT list(v.…) AS members, list(v.g) AS list FROM v GROUP BY …))
"""

from __future__ import annotations

from sqlglot import exp

from metaql.best_pairs import Best, best_of
from metaql.catalogue import Catalogue
from metaql.compile import keep_name, name_outputs, read_from
from metaql.pair_shape import Shape, Side, shape_of
from metaql.parse import standing_for
from metaql.scope import Unsure, name_of
from metaql.stats import Statistics
from metaql.udfs.best import BEST
from metaql.udfs.members import MEMBERS
from metaql.udfs.scores import SCORES

# Members of a list: a tile of 2,048 rows beside it takes 8 MB.
LIST = 512
PAIRS, LISTS = "metaql_pairs", "metaql_lists"
HITS = "metaql_hits"
MEMBER, ALL, PLACE, HIT = "metaql_member", "metaql_members", "metaql_place", "metaql_hit"


def compile_pairs(select: exp.Select, catalogue: Catalogue, statistics: Statistics) -> bool:
    """Puts lists in place of one side of the SELECT's products, where there are many pairs; whether it did.

    Conditions stay what they are: those of one side go along with it, an equality between the sides becomes one
    between rows and lists, and the others are asked of the pairs.
    """
    try:
        shape = shape_of(select, catalogue, statistics)
    except Unsure:
        return False
    if shape is None:
        return False
    name_outputs(select, select, catalogue)
    _rewrite(shape, best_of(shape))
    return True


def _rewrite(shape: Shape, best: Best | None) -> None:
    select, rows, members = shape.scope.select, shape.rows, shape.members
    vectors: dict[str, exp.Expr] = {}
    scores: dict[str, exp.Expr] = {}
    for number, (call, ours, theirs) in enumerate(shape.products, start=1):
        vector = next((name for name, known in vectors.items() if known == theirs), f"metaql_vector_{len(vectors) + 1}")
        vectors[vector] = theirs
        measure = exp.Literal.string(name_of(call))
        expressions = [measure, ours, exp.column(vector, LISTS)]
        scored = exp.Anonymous(this=SCORES, expressions=expressions)
        name = next((name for name, known in scores.items() if known == scored), f"metaql_score_{number}")
        scores[name] = scored
        keep_name(select, call)
        call.replace(standing_for(exp.column(name, PAIRS), call))
    for key in ("expressions", "group", "having", "qualify", "order"):
        value = select.args.get(key)
        for root in list(value) if isinstance(value, list) else [value] if value is not None else []:
            _rename_columns(root, shape)
    conditions = [_renamed(one, shape) for one in shape.conditions]
    lists = _lists(members, vectors)
    pairs = _pairs(rows, members, scores, lists) if best is None else _best_pairs(rows, members, scores, lists, best)
    read_from(select, [pairs], conditions)


def _rename_columns(root: exp.Expr, shape: Shape) -> None:
    for column in list(root.find_all(exp.Column)):
        if column.table == PAIRS or shape.scope.is_alias(column):
            continue
        owners = shape.scope.owners(column)
        if len(owners) == 1:
            keep_name(shape.scope.select, column)
            column.replace(standing_for(_place(column, next(iter(owners)), shape), column))


def _renamed(condition: exp.Expr, shape: Shape) -> exp.Expr:
    def place(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Column) and node.table in shape.rows.aliases | shape.members.aliases:
            return standing_for(_place(node, node.table, shape), node)
        return node

    return condition.copy().transform(place)


def _place(column: exp.Column, owner: str, shape: Shape) -> exp.Expr:
    """Where a column is among the pairs; a field of a struct stays one."""
    parts = column.parts
    first = 1 if len(parts) > 1 and parts[0].name.lower() == owner.lower() else 0
    own = exp.column(parts[first].copy(), owner)
    fields = [part.copy() for part in parts[first + 1 :]]
    if owner in shape.rows.aliases:
        return (
            exp.Dot.build([exp.column(shape.rows.column(own), PAIRS), *fields])
            if fields
            else exp.column(shape.rows.column(own), PAIRS)
        )
    return exp.Dot.build([exp.column(MEMBER, PAIRS), exp.to_identifier(shape.members.column(own)), *fields])


def _pairs(rows: Side, members: Side, scores: dict[str, exp.Expr], lists: exp.Expr) -> exp.Expr:
    chosen = [exp.alias_(sql.copy(), name) for name, sql in rows.columns.items()]
    if members.columns:
        chosen.append(exp.alias_(exp.Unnest(expressions=[exp.column(ALL, LISTS)]), MEMBER))
    chosen += [exp.alias_(exp.Unnest(expressions=[sql]), name) for name, sql in scores.items()]
    ties = [
        exp.EQ(this=key.copy(), expression=exp.column(f"metaql_key_{n}", LISTS))
        for n, key in enumerate(rows.keys, start=1)
    ]
    query = read_from(exp.Select(expressions=chosen), [*rows.items, lists], [*rows.conjuncts, *ties])
    return _named(query, PAIRS)


def _best_pairs(rows: Side, members: Side, scores: dict[str, exp.Expr], lists: exp.Expr, best: Best) -> exp.Expr:
    """Of each call's pairs those that may be among the best of all, ties included."""
    ((name, scored),) = scores.items()
    count, side = exp.Literal.number(best.count), exp.Literal.string(best.side)
    hit = exp.Unnest(expressions=[exp.Anonymous(this=BEST, expressions=[*scored.expressions, count, side])])
    chosen = [exp.alias_(sql.copy(), column) for column, sql in rows.columns.items()]
    chosen += [exp.column(ALL, LISTS)] if members.columns else []
    ties = [exp.EQ(this=key.copy(), expression=one) for key, one in zip(rows.keys, _keys(rows), strict=True)]
    inner = read_from(
        exp.Select(expressions=[*chosen, exp.alias_(hit, HIT)]), [*rows.items, lists], [*rows.conjuncts, *ties]
    )
    outer: list[exp.Expr] = [exp.column(column) for column in rows.columns]
    outer.append(exp.alias_(exp.column("score", HIT), name))
    if members.columns:
        member = exp.Bracket(this=exp.column(ALL), expressions=[exp.column("member", HIT)], offset=1)
        outer.append(exp.alias_(member, MEMBER))
    return _named(read_from(exp.Select(expressions=outer), [_named(inner, HITS)], []), PAIRS)


def _keys(rows: Side) -> list[exp.Expr]:
    return [exp.column(f"metaql_key_{number}", LISTS) for number in range(1, len(rows.keys) + 1)]


def _lists(members: Side, vectors: dict[str, exp.Expr]) -> exp.Expr:
    """The members in lists, those with equal keys together; a member's place in each list is the same."""
    keys = {f"metaql_key_{n}": key for n, key in enumerate(members.keys, start=1)}
    place = exp.Window(this=exp.RowNumber(), partition_by=[key.copy() for key in keys.values()])
    named = {**keys, **members.columns, **vectors, PLACE: place}
    inner = read_from(
        exp.Select(expressions=[exp.alias_(sql.copy(), name) for name, sql in named.items()]),
        members.items,
        members.conjuncts,
    )
    chosen: list[exp.Expr] = [exp.column(name) for name in keys]
    if members.columns:
        fields = [exp.PropertyEQ(this=exp.to_identifier(name), expression=exp.column(name)) for name in members.columns]
        chosen.append(exp.alias_(_list(exp.Struct(expressions=fields)), ALL))
    for name in vectors:
        chosen.append(exp.alias_(exp.Anonymous(this=MEMBERS, expressions=[_list(exp.column(name))]), name))
    query = exp.Select(expressions=chosen)
    read_from(query, [_named(inner, "metaql_side")], [])
    number = exp.IntDiv(
        this=exp.paren(exp.Sub(this=exp.column(PLACE), expression=exp.Literal.number(1))),
        expression=exp.Literal.number(LIST),
    )
    query.set("group", exp.Group(expressions=[*(exp.column(name) for name in keys), number]))
    return _named(query, LISTS)


def _named(query: exp.Select, alias: str) -> exp.Subquery:
    return exp.Subquery(this=query, alias=exp.TableAlias(this=exp.to_identifier(alias)))


def _list(value: exp.Expr) -> exp.Expr:
    ordered = exp.Order(this=value, expressions=[exp.Ordered(this=exp.column(PLACE), nulls_first=False)])
    return exp.ArrayAgg(this=ordered)
