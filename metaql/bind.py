"""From a SELECT's syntax to a logical block: which relation every name belongs to, and what is gradient algebra.

``bind`` answers None whenever it is not sure. The query then runs as it was written, pair by pair, which is always
right; so every doubt here costs time and never an answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from sqlglot import exp

from metaql.catalogue import Catalogue, alias_of
from metaql.logical import AVG, SUM, Block, Relation, Scalar, Score, Vector
from metaql.parse import to_sql

# What stays the same when each row of a group comes k times.
_STEADY = (exp.Avg, exp.Min, exp.Max, exp.AnyValue, exp.LogicalAnd, exp.LogicalOr)
# Evaluated once for each row or at a moment of their own, so that fewer rows would give other values.
_VOLATILE = frozenset({"random", "rand", "uuid", "gen_random_uuid", "uuidv4", "uuidv7", "nextval", "setseed"})


class Unsure(Exception):  # noqa: N818 - never leaves this module
    """The SELECT has something that is not understood well enough to be moved."""


@dataclass(frozen=True)
class Bound:
    """A block, and the aggregate in the syntax tree that each of its scores stands for."""

    block: Block
    places: tuple[exp.Expr, ...]


def bind(select: exp.Select, catalogue: Catalogue) -> Bound | None:
    """The SELECT as a logical block, or None when it is not one that the rules could do anything for."""
    places = tuple(node for node in select.walk() if _is_score(node) and node.find_ancestor(exp.Query) is select)
    if not places:
        return None
    try:
        return Bound(_Binder(select, catalogue).block(places), places)
    except Unsure:
        return None


class _Binder:
    def __init__(self, select: exp.Select, catalogue: Catalogue) -> None:
        self._check_shape(select)
        self._select = select
        self._is_scalar = catalogue.is_scalar
        self._items = relations(select)
        columns = catalogue.columns(select)
        if columns is None:
            raise Unsure
        self._columns = columns
        self._aliases = {item.alias.lower(): item.this for item in select.expressions if isinstance(item, exp.Alias)}

    def block(self, places: tuple[exp.Expr, ...]) -> Block:
        conjuncts = tuple(self._conjunct(node) for node in self._conjuncts())
        keys = tuple(Scalar(key, self._reads(key)) for key in self._keys(places))
        relations = tuple(Relation(alias_of(item, n), item) for n, item in enumerate(self._items))
        scores = tuple(self._score(place) for place in places)
        return Block(relations, conjuncts, keys, tuple(self._others(places, keys)), scores)

    def _check_shape(self, select: exp.Select) -> None:
        """Only what is a group over a join: DISTINCT ON, samples and grouping sets multiply rows in other ways."""
        known = {"expressions", "from_", "joins", "where", "group", "having", "order", "limit", "offset", "with_"}
        known |= {"distinct", "qualify"}
        if any(value and key not in known for key, value in select.args.items()):
            raise Unsure
        group = select.args.get("group")
        if group and any(value and key not in ("expressions", "all") for key, value in group.args.items()):
            raise Unsure
        if any(isinstance(item, exp.Star) or item.find(exp.Columns) for item in select.expressions):
            raise Unsure
        if any(_name(node) in _VOLATILE for node in select.find_all(exp.Func)) or select.find(exp.TableSample):
            raise Unsure

    def _conjuncts(self) -> Iterator[exp.Expr]:
        where = self._select.args.get("where")
        roots = [join.args.get("on") for join in self._select.args.get("joins") or ()]
        for root in (*roots, where.this if where else None):
            if root is not None:
                yield from root.flatten() if isinstance(root, exp.And) else (root,)

    def _conjunct(self, node: exp.Expr) -> Scalar:
        """Aliases of the select list are visible in WHERE, but not where a condition might be moved to."""
        names = {column.name.lower() for column in node.find_all(exp.Column) if not column.table}
        if names & self._aliases.keys() - self._all_columns():
            raise Unsure
        return Scalar(node, self._reads(node))

    def _keys(self, places: tuple[exp.Expr, ...]) -> Iterator[exp.Expr]:
        group = self._select.args.get("group")
        if group is None:
            return
        if group.args.get("all"):
            for item in self._select.expressions:
                if not any(self._is_aggregate(node, places) for node in item.walk()):
                    yield item.unalias()
        for key in group.expressions:
            yield self._key(key)

    def _key(self, key: exp.Expr) -> exp.Expr:
        """A key may be given by its place in the select list, or by its alias there."""
        if isinstance(key, exp.Literal) and not key.is_string:
            number = int(key.name) - 1
            if not 0 <= number < len(self._select.expressions):
                raise Unsure
            item: exp.Expr = self._select.expressions[number].unalias()
            return item
        if isinstance(key, exp.Column) and not key.table and key.name.lower() not in self._all_columns():
            if key.name.lower() not in self._aliases:
                raise Unsure
            aliased: exp.Expr = self._aliases[key.name.lower()]
            return aliased
        return key

    def _others(self, places: tuple[exp.Expr, ...], keys: tuple[Scalar, ...]) -> Iterator[Scalar]:
        """Every expression over the rows that is neither a key nor within a score."""
        given = {self._canonical(key.sql) for key in keys}
        roots = [self._select.args.get(part) for part in ("having", "qualify", "order")]
        pending: list[exp.Expr] = [item.unalias() for item in self._select.expressions]
        pending += [root for root in roots if root is not None]
        while pending:
            node = pending.pop()
            if any(node is place for place in places) or self._canonical(node) in given:
                continue
            if isinstance(node, exp.Window):
                # It runs over the groups, of which there are as many as before.
                pending.extend(self._around(node))
            elif self._is_aggregate(node, places):
                if not (isinstance(node, _STEADY) or _counts_distinct(node)) or isinstance(node.parent, exp.Filter):
                    raise Unsure
                yield Scalar(node, self._reads(node))
            elif isinstance(node, exp.Column):
                # Outside an aggregate a column is a key, or an alias for something that is looked at anyway.
                if self._reads(node):
                    raise Unsure
            elif isinstance(node, exp.Query):
                yield Scalar(node, self._reads(node))
            else:
                pending.extend(child for child in node.iter_expressions())

    def _around(self, window: exp.Window) -> Iterator[exp.Expr]:
        function = window.args["this"]
        if not isinstance(function, exp.Func):
            raise Unsure
        yield from function.iter_expressions()
        yield from (child for child in window.iter_expressions() if child.arg_key != "this")

    def _canonical(self, node: exp.Expr) -> str:
        """The same text for the same expression, whether or not its columns say whose they are."""

        def qualified(one: exp.Expr) -> exp.Expr:
            if isinstance(one, exp.Column) and not one.table and len(self._owners(one)) == 1:
                return exp.column(one.name, next(iter(self._owners(one))))
            return one

        return to_sql(node.transform(qualified), comments=False).lower()

    def _is_aggregate(self, node: exp.Expr, places: tuple[exp.Expr, ...]) -> bool:
        if any(node is place for place in places) or isinstance(node, exp.AggFunc):
            return True
        # sqlglot knows which of the functions that it has classes for are aggregates; others DuckDB knows.
        return isinstance(node, exp.Anonymous) and not self._is_scalar(node.name)

    def _score(self, place: exp.Expr) -> Score:
        """avg or sum of a product with one inner product in it."""
        if isinstance(place.parent, exp.Window | exp.Filter):
            raise Unsure
        found = sum_or_average(place)
        assert found is not None
        function, argument = found
        parts = list(factors(argument))
        products = [part for part in parts if _is_inner_product(part)]
        if len(products) != 1:
            raise Unsure
        left, right = (Vector(argument, self._reads(argument)) for argument in products[0].expressions)
        weights = tuple(Scalar(one, self._reads(one)) for one in parts if one is not products[0])
        return Score(function, weights, left, right)

    def _reads(self, node: exp.Expr) -> frozenset[str]:
        """The relations that an expression reads; one too many rather than one too few."""
        return frozenset(alias for column in node.find_all(exp.Column) for alias in self._owners(column))

    def _owners(self, column: exp.Column) -> set[str]:
        """A name of another query, outside or further inside, belongs to none."""
        first = column.parts[0].name.lower()
        if len(column.parts) > 1:
            named = {alias for alias in self._columns if alias.lower() == first}
            if named:
                return named
        return {alias for alias, columns in self._columns.items() if first in columns}

    def _all_columns(self) -> set[str]:
        return {name for columns in self._columns.values() for name in columns}


def relations(select: exp.Select) -> list[exp.Expr]:
    """The items of FROM; Unsure unless they are joined by nothing but conditions."""
    source = select.args.get("from_")
    if source is None:
        raise Unsure
    items = [source.this]
    for join in select.args.get("joins") or ():
        if any(join.args.get(key) for key in ("side", "method", "using", "global", "hint", "match_condition")):
            raise Unsure
        if (join.args.get("kind") or "").upper() not in ("", "INNER", "CROSS"):
            raise Unsure
        items.append(join.this)
    if not all(isinstance(item, exp.Table | exp.Subquery) for item in items):
        raise Unsure
    aliases = {alias_of(item, n).lower() for n, item in enumerate(items)}
    if len(aliases) < len(items):
        raise Unsure
    if any(item.args.get(key) for item in items for key in ("joins", "laterals", "pivots", "sample")):
        raise Unsure
    return items


def sum_or_average(node: exp.Expr) -> tuple[str, exp.Expr] | None:
    """(avg or sum, its argument); None for anything else."""
    if isinstance(node, exp.Avg | exp.Sum):
        return (AVG if isinstance(node, exp.Avg) else SUM), node.this
    if isinstance(node, exp.Anonymous) and _name(node) == "mean" and len(node.expressions) == 1:
        return AVG, node.expressions[0]
    return None


def _is_score(node: exp.Expr) -> bool:
    found = sum_or_average(node)
    return found is not None and any(_is_inner_product(factor) for factor in factors(found[1]))


def _is_inner_product(node: exp.Expr) -> bool:
    return isinstance(node, exp.Anonymous) and _name(node) == "inner_product" and len(node.expressions) == 2


def factors(node: exp.Expr) -> Iterator[exp.Expr]:
    """The factors of a product; a minus is one, and so is a number that it is divided by."""
    if isinstance(node, exp.Paren):
        yield from factors(node.this)
    elif isinstance(node, exp.Neg):
        yield exp.Neg(this=exp.Literal.number(1))
        yield from factors(node.this)
    elif isinstance(node, exp.Div) and isinstance(node.right, exp.Literal) and node.right.is_number:
        yield from factors(node.left)
        yield exp.Div(this=exp.Literal.number("1.0"), expression=node.right.copy())
    elif isinstance(node, exp.Mul):
        yield from factors(node.left)
        yield from factors(node.right)
    else:
        yield node


def _counts_distinct(node: exp.Expr) -> bool:
    return isinstance(node, exp.Count) and isinstance(node.this, exp.Distinct)


def _name(node: exp.Expr) -> str:
    if isinstance(node, exp.Anonymous):
        return node.name.lower()
    return node.sql_name().lower() if isinstance(node, exp.Func) else ""
