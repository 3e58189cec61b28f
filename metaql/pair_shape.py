"""The two sides of a SELECT over all pairs: rows on the one, members of lists on the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlglot import exp

from metaql.algebra import is_product
from metaql.bind import conjuncts_of
from metaql.catalogue import Catalogue, alias_of
from metaql.logical import OUTER, Relation, Scalar
from metaql.scope import Scope, check_shape, name_of
from metaql.stats import Statistics
from metaql.udfs.score import SCORE

# Fewer pairs (those of two calls of DuckDB), or fewer members for each key, are looked up sooner than lists are made.
FEWEST_PAIRS = 1 << 12
FEWEST_MEMBERS = 16


@dataclass
class Side:
    """Relations of one side with their own conditions; the columns of theirs that the SELECT reads, and vectors."""

    aliases: frozenset[str]
    relations: tuple[Relation, ...]
    own: tuple[Scalar, ...]
    rows: float
    columns: dict[str, exp.Expr] = field(default_factory=dict)
    keys: list[exp.Expr] = field(default_factory=list)

    @property
    def items(self) -> list[exp.Expr]:
        """What stands in FROM."""
        return [relation.item for relation in self.relations]

    @property
    def conjuncts(self) -> list[exp.Expr]:
        """Conditions on this side alone."""
        return [one.sql for one in self.own]

    def column(self, sql: exp.Expr) -> str:
        """The name that an expression of this side gets among the pairs."""
        for name, known in self.columns.items():
            if known == sql:
                return name
        name = f"metaql_column_{len(self.columns) + 1}"
        self.columns[name] = sql
        return name


@dataclass
class Shape:
    scope: Scope
    rows: Side
    members: Side
    products: list[tuple[exp.Anonymous, exp.Expr, exp.Expr]]
    conditions: list[exp.Expr]


def shape_of(select: exp.Select, catalogue: Catalogue, statistics: Statistics) -> Shape | None:
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
    sides = [_side(side, scope, conjuncts, statistics, catalogue) for side in (left, right)]
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
    shape = Shape(scope, rows, members, products, [])
    groups = _ties(shape, conjuncts, statistics)
    if rows.rows * members.rows / groups < FEWEST_PAIRS or members.rows / groups < FEWEST_MEMBERS:
        return None
    return shape if _can_rename(shape) else None


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
) -> Side | None:
    own = tuple(one for one in conjuncts if one.reads and one.reads <= aliases)
    relations = tuple(
        Relation(alias_of(item, n), item, catalogue.unique_columns(item, scope.select))
        for n, item in enumerate(scope.items)
        if alias_of(item, n) in aliases
    )
    rows = statistics.rows(relations, own).value
    return None if rows is None else Side(aliases, relations, own, rows)


def _ties(shape: Shape, conjuncts: list[Scalar], statistics: Statistics) -> float:
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
    keys = tuple(Scalar(key, members.aliases) for key in members.keys)
    return max(statistics.groups(members.relations, members.own, keys).value or 1, 1)


def _owners(node: exp.Expr) -> frozenset[str]:
    return frozenset(column.table for column in node.find_all(exp.Column))


def _is_unclear(column: exp.Column, shape: Shape) -> bool:
    """Whether a name is one of several columns, or perhaps no column but a whole row."""
    owners = shape.scope.owners(column)
    if not owners and column.sql("duckdb").lower() in {alias.lower() for alias in shape.scope.columns}:
        return True
    return len(owners) > 1 and not shape.scope.is_alias(column)


def _can_rename(shape: Shape) -> bool:
    """Whether every column is read where it can be told and replaced: not in a nested query."""
    both = shape.rows.aliases | shape.members.aliases
    within = {id(node) for call, *_ in shape.products for node in call.walk()}
    for key in ("expressions", "group", "having", "qualify", "order"):
        value = shape.scope.select.args.get(key)
        for root in value if isinstance(value, list) else [value] if value is not None else []:
            if any(isinstance(node, exp.Query) and shape.scope.reads(node) & both for node in root.walk()):
                return False
            if any(_is_unclear(one, shape) for one in root.find_all(exp.Column) if id(one) not in within):
                return False
    return True
