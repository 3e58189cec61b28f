"""All pairs of two relations: one is read a chunk at a time, the other stands beside it in lists of gradients.

DuckDB hands a cross product to a function as single pairs, of which looking up the rows is most of the cost. With
some hundreds of gradients behind one number, a call is a product of matrices, and DuckDB unnests its result.

    FROM t, v                         FROM (SELECT t.…, unnest(members) AS member, unnest(scores(t.g, list)) AS score
    … inner_product(t.g, v.g) …  =>         FROM t, (SELECT list(v.…) AS members, list(v.g) AS list FROM v GROUP BY …))
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlglot import exp

from metaql.algebra import is_product
from metaql.bind import conjuncts_of
from metaql.catalogue import Catalogue, alias_of
from metaql.compile import keep_name, name_outputs
from metaql.logical import OUTER, Relation, Scalar
from metaql.parse import standing_for
from metaql.scope import Scope, Unsure, check_shape, name_of
from metaql.stats import Statistics
from metaql.udfs.best import BEST
from metaql.udfs.members import MEMBERS
from metaql.udfs.score import SCORE
from metaql.udfs.scores import SCORES

# Members of a list: a tile of 2,048 rows beside it takes 8 MB.
LIST = 512
# Fewer pairs, or fewer members for each key, are looked up sooner than lists are made.
FEWEST_PAIRS = 1 << 16
FEWEST_MEMBERS = 16
PAIRS, LISTS = "metaql_pairs", "metaql_lists"
HITS = "metaql_hits"
MEMBER, ALL, PLACE, HIT = "metaql_member", "metaql_members", "metaql_place", "metaql_hit"


def compile_pairs(select: exp.Select, catalogue: Catalogue, statistics: Statistics) -> bool:
    """Puts lists in place of one side of the SELECT's products, where there are many pairs; whether it did.

    Conditions stay what they are: those of one side go along with it, an equality between the sides becomes one
    between rows and lists, and the others are asked of the pairs.
    """
    try:
        shape = _shape(select, catalogue, statistics)
    except Unsure:
        return False
    if shape is None:
        return False
    name_outputs(select, select, catalogue)
    _rewrite(shape, best_of(shape))
    return True


@dataclass
class _Side:
    """Relations of one side with their own conditions; the columns of theirs that the SELECT reads, and vectors."""

    aliases: frozenset[str]
    items: list[exp.Expr]
    conjuncts: list[exp.Expr]
    rows: float
    columns: dict[str, exp.Expr] = field(default_factory=dict)
    keys: list[exp.Expr] = field(default_factory=list)

    def column(self, sql: exp.Expr) -> str:
        """The name that an expression of this side gets among the pairs."""
        for name, known in self.columns.items():
            if known == sql:
                return name
        name = f"metaql_column_{len(self.columns) + 1}"
        self.columns[name] = sql
        return name


@dataclass
class _Shape:
    scope: Scope
    rows: _Side
    members: _Side
    products: list[tuple[exp.Anonymous, exp.Expr, exp.Expr]]
    conditions: list[exp.Expr]


def _shape(select: exp.Select, catalogue: Catalogue, statistics: Statistics) -> _Shape | None:
    calls = list(_products(select))
    if not calls:
        return None
    check_shape(select)
    scope = Scope(select, catalogue)
    aliases = [alias_of(item, n) for n, item in enumerate(scope.items)]
    if len(aliases) < 2 or any(alias.startswith("(") for alias in aliases):
        return None
    conjuncts = [Scalar(scope.qualified(one), scope.reads(one)) for one in conjuncts_of(select)]
    left, right = _reads(scope, calls[0], 0), _reads(scope, calls[0], 1)
    if not left or not right or left & right or OUTER in left | right:
        return None
    left, right = _grown(left, right, conjuncts), _grown(right, left, conjuncts)
    if left & right or left | right != set(aliases):
        return None
    sides = [_side(side, scope, conjuncts, statistics, catalogue, select) for side in (left, right)]
    if None in sides:
        return None
    rows, members = sorted((one for one in sides if one is not None), key=lambda one: -one.rows)
    products = []
    for call in calls:
        found = {frozenset(_reads(scope, call, n)): call.expressions[n] for n in (0, 1)}
        ours = [arg for reads, arg in found.items() if reads and reads <= rows.aliases]
        theirs = [arg for reads, arg in found.items() if reads and reads <= members.aliases]
        if len(ours) != 1 or len(theirs) != 1:
            return None
        products.append((call, scope.qualified(ours[0]), scope.qualified(theirs[0])))
    shape = _Shape(scope, rows, members, products, [])
    groups = _ties(shape, conjuncts, statistics, catalogue, select)
    if rows.rows * members.rows / groups < FEWEST_PAIRS or members.rows / groups < FEWEST_MEMBERS:
        return None
    return shape if _can_rename(shape) else None


@dataclass(frozen=True)
class _Best:
    """So many best pairs are asked for, of each ``side``; the smallest where the count is below 0."""

    count: int
    side: str


def best_of(shape: _Shape) -> _Best | None:
    """The k best pairs that the SELECT wants, of all or of each row or member; None where it looks at others too.

    The best of a group of rows or members are among the best of its parts. What is asked of pairs besides, or
    counted over them, needs them all.
    """
    select = shape.scope.select
    if len(shape.products) != 1 or shape.conditions or select.args.get("distinct") or select.args.get("group"):
        return None
    windows = {window.sql("duckdb"): window for window in select.find_all(exp.Window)}
    if select.find(exp.AggFunc) or len(windows) > 1:
        return None
    if not windows:
        return _top(shape) if not select.args.get("qualify") else None
    ((_, window),) = windows.items()
    return _top_of_each(shape, window)


def _top(shape: _Shape) -> _Best | None:
    order, limit = shape.scope.select.args.get("order"), shape.scope.select.args.get("limit")
    offset = shape.scope.select.args.get("offset")
    count = _number(limit.expression if limit else None)
    skipped = _number(offset.expression) if offset else 0
    if order is None or not count or skipped is None:
        return None
    return _ordered(shape, order, count + skipped, "all")


def _top_of_each(shape: _Shape, window: exp.Window) -> _Best | None:
    qualify, order = shape.scope.select.args.get("qualify"), window.args.get("order")
    if (
        qualify is None
        or order is None
        or window.args.get("spec")
        or name_of(window.this) not in ("row_number", "rank")
    ):
        return None
    condition = qualify.this
    found = [
        _bound(one, window, shape) for one in (condition.flatten() if isinstance(condition, exp.And) else [condition])
    ]
    counts = [count for count in found if count]
    reads = frozenset[str]().union(*(shape.scope.reads(one) for one in window.args.get("partition_by") or ()))
    sides = {"member": shape.members.aliases, "row": shape.rows.aliases}
    side = "all" if not reads else next((name for name, aliases in sides.items() if reads <= aliases), None)
    if not counts or side is None:
        return None
    return _ordered(shape, order, min(counts), side)


def _bound(condition: exp.Expr, window: exp.Window, shape: _Shape) -> int | None:
    """k, where the condition is that the window's number is at most k."""
    if not isinstance(condition, exp.LTE | exp.LT | exp.EQ):
        return None
    number = condition.left
    if isinstance(number, exp.Column) and shape.scope.is_alias(number):
        number = shape.scope.aliases[number.name.lower()]
    count = _number(condition.right)
    if number.sql("duckdb") != window.sql("duckdb") or count is None:
        return None
    return count - 1 if isinstance(condition, exp.LT) else count


def _ordered(shape: _Shape, order: exp.Order, count: int, side: str) -> _Best | None:
    """Only where the score itself comes first, and NULLs last, as they do by default."""
    first = order.expressions[0]
    score = first.this
    if isinstance(score, exp.Column) and len(score.parts) == 1:
        score = shape.scope.aliases.get(score.name.lower())
    if score is not shape.products[0][0] and score != shape.products[0][0]:
        return None
    if first.args.get("nulls_first") or count < 1:
        return None
    return _Best(count if first.args.get("desc") else -count, side)


def _number(node: exp.Expr | None) -> int | None:
    return int(node.name) if isinstance(node, exp.Literal) and node.name.isdigit() else None


def _products(select: exp.Select) -> Iterator[exp.Anonymous]:
    for node in select.find_all(exp.Anonymous):
        if is_product(node) and name_of(node) != SCORE and node.find_ancestor(exp.Query) is select:
            yield node


def _reads(scope: Scope, call: exp.Anonymous, place: int) -> frozenset[str]:
    return scope.reads(call.expressions[place])


def _grown(side: frozenset[str], other: frozenset[str], conjuncts: list[Scalar]) -> frozenset[str]:
    before: frozenset[str] = frozenset()
    while before != side:
        before = side
        for one in conjuncts:
            if one.reads & side and not one.reads & other:
                side = side | (one.reads - {OUTER})
    return side


def _side(
    aliases: frozenset[str],
    scope: Scope,
    conjuncts: list[Scalar],
    statistics: Statistics,
    catalogue: Catalogue,
    select: exp.Select,
) -> _Side | None:
    items = [item for n, item in enumerate(scope.items) if alias_of(item, n) in aliases]
    own = tuple(one for one in conjuncts if one.reads and one.reads <= aliases)
    relations = tuple(
        Relation(alias_of(item, n), item, catalogue.unique_columns(item, select))
        for n, item in enumerate(scope.items)
        if alias_of(item, n) in aliases
    )
    rows = statistics.rows(relations, own).value
    return None if rows is None else _Side(aliases, items, [one.sql for one in own], rows)


def _ties(
    shape: _Shape, conjuncts: list[Scalar], statistics: Statistics, catalogue: Catalogue, select: exp.Select
) -> float:
    """Takes equalities between the sides as keys, and the rest as conditions on pairs; how many keys there are."""
    rows, members = shape.rows, shape.members
    for one in conjuncts:
        if one.reads and (one.reads <= rows.aliases or one.reads <= members.aliases):
            continue
        parts = (one.sql.args["this"], one.sql.args["expression"]) if isinstance(one.sql, exp.EQ) else ()
        ours = [part for part in parts if _owners(part) and _owners(part) <= rows.aliases]
        theirs = [part for part in parts if _owners(part) and _owners(part) <= members.aliases]
        if ours and theirs and not one.sql.find(exp.Query):
            rows.keys.append(ours[0])
            members.keys.append(theirs[0])
        else:
            shape.conditions.append(one.sql)
    if not members.keys:
        return 1
    relations = tuple(
        Relation(alias_of(item, n), item, catalogue.unique_columns(item, select))
        for n, item in enumerate(shape.scope.items)
        if alias_of(item, n) in members.aliases
    )
    own = tuple(one for one in conjuncts if one.reads and one.reads <= members.aliases)
    keys = tuple(Scalar(key, members.aliases) for key in members.keys)
    return max(statistics.groups(relations, own, keys).value or 1, 1)


def _owners(node: exp.Expr) -> frozenset[str]:
    return frozenset(column.table for column in node.find_all(exp.Column))


def _can_rename(shape: _Shape) -> bool:
    """Whether every column is read where it can be told and replaced: not in a nested query."""
    both = shape.rows.aliases | shape.members.aliases
    within = {id(node) for call, *_ in shape.products for node in call.walk()}
    for key in ("expressions", "group", "having", "qualify", "order"):
        value = shape.scope.select.args.get(key)
        for root in value if isinstance(value, list) else [value] if value is not None else []:
            if any(isinstance(node, exp.Query) and shape.scope.reads(node) & both for node in root.walk()):
                return False
            for column in root.find_all(exp.Column):
                if (
                    id(column) not in within
                    and len(shape.scope.owners(column)) > 1
                    and not shape.scope.is_alias(column)
                ):
                    return False
    return True


def _rewrite(shape: _Shape, best: _Best | None) -> None:
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
    select.set("from_", exp.From(this=pairs))
    select.set("joins", None)
    select.set("where", exp.Where(this=exp.and_(*conditions)) if conditions else None)


def _rename_columns(root: exp.Expr, shape: _Shape) -> None:
    for column in list(root.find_all(exp.Column)):
        if column.table == PAIRS or shape.scope.is_alias(column):
            continue
        owners = shape.scope.owners(column)
        if len(owners) == 1:
            keep_name(shape.scope.select, column)
            column.replace(standing_for(_place(column, next(iter(owners)), shape), column))


def _renamed(condition: exp.Expr, shape: _Shape) -> exp.Expr:
    def place(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Column) and node.table in shape.rows.aliases | shape.members.aliases:
            return standing_for(_place(node, node.table, shape), node)
        return node

    return condition.copy().transform(place)


def _place(column: exp.Column, owner: str, shape: _Shape) -> exp.Expr:
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


def _pairs(rows: _Side, members: _Side, scores: dict[str, exp.Expr], lists: exp.Expr) -> exp.Expr:
    chosen = [exp.alias_(sql.copy(), name) for name, sql in rows.columns.items()]
    if members.columns:
        chosen.append(exp.alias_(exp.Unnest(expressions=[exp.column(ALL, LISTS)]), MEMBER))
    chosen += [exp.alias_(exp.Unnest(expressions=[sql]), name) for name, sql in scores.items()]
    ties = [
        exp.EQ(this=key.copy(), expression=exp.column(f"metaql_key_{n}", LISTS))
        for n, key in enumerate(rows.keys, start=1)
    ]
    query = _query(chosen, [*rows.items, lists], [*rows.conjuncts, *ties])
    return _named(query, PAIRS)


def _best_pairs(rows: _Side, members: _Side, scores: dict[str, exp.Expr], lists: exp.Expr, best: _Best) -> exp.Expr:
    """Of each call's pairs those that may be among the best of all, ties included."""
    ((name, scored),) = scores.items()
    count, side = exp.Literal.number(best.count), exp.Literal.string(best.side)
    hit = exp.Unnest(expressions=[exp.Anonymous(this=BEST, expressions=[*scored.expressions, count, side])])
    chosen = [exp.alias_(sql.copy(), column) for column, sql in rows.columns.items()]
    chosen += [exp.column(ALL, LISTS)] if members.columns else []
    ties = [exp.EQ(this=key.copy(), expression=one) for key, one in zip(rows.keys, _keys(rows), strict=True)]
    inner = _query([*chosen, exp.alias_(hit, HIT)], [*rows.items, lists], [*rows.conjuncts, *ties])
    outer: list[exp.Expr] = [exp.column(column) for column in rows.columns]
    outer.append(exp.alias_(exp.column("score", HIT), name))
    if members.columns:
        member = exp.Bracket(this=exp.column(ALL), expressions=[exp.column("member", HIT)], offset=1)
        outer.append(exp.alias_(member, MEMBER))
    return _named(_query(outer, [_named(inner, HITS)], []), PAIRS)


def _keys(rows: _Side) -> list[exp.Expr]:
    return [exp.column(f"metaql_key_{number}", LISTS) for number in range(1, len(rows.keys) + 1)]


def _lists(members: _Side, vectors: dict[str, exp.Expr]) -> exp.Expr:
    """The members in lists, those with equal keys together; a member's place in each list is the same."""
    keys = {f"metaql_key_{n}": key for n, key in enumerate(members.keys, start=1)}
    place = exp.Window(this=exp.RowNumber(), partition_by=[key.copy() for key in keys.values()])
    named = {**keys, **members.columns, **vectors, PLACE: place}
    inner = _query([exp.alias_(sql.copy(), name) for name, sql in named.items()], members.items, members.conjuncts)
    chosen: list[exp.Expr] = [exp.column(name) for name in keys]
    if members.columns:
        fields = [exp.PropertyEQ(this=exp.to_identifier(name), expression=exp.column(name)) for name in members.columns]
        chosen.append(exp.alias_(_list(exp.Struct(expressions=fields)), ALL))
    for name in vectors:
        chosen.append(exp.alias_(exp.Anonymous(this=MEMBERS, expressions=[_list(exp.column(name))]), name))
    query = exp.Select(expressions=chosen)
    query.set(
        "from_", exp.From(this=exp.Subquery(this=inner, alias=exp.TableAlias(this=exp.to_identifier("metaql_side"))))
    )
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


def _query(expressions: list[exp.Expr], items: list[exp.Expr], conditions: list[exp.Expr]) -> exp.Select:
    query = exp.Select(expressions=expressions)
    query.set("from_", exp.From(this=items[0].copy()))
    query.set("joins", [exp.Join(this=item.copy(), kind="CROSS") for item in items[1:]])
    query.set("where", exp.Where(this=exp.and_(*(one.copy() for one in conditions))) if conditions else None)
    return query
