"""From a SELECT's syntax to a logical block: which relation every name belongs to, and what is gradient algebra.

``bind`` is Unsure whenever it does not know. The query then runs as it was written, pair by pair, which is always
right; so every doubt here costs time and never an answer.
"""

from __future__ import annotations

from collections.abc import Iterator

from sqlglot import exp

from metaql.algebra import expand, holds_product
from metaql.catalogue import Catalogue, alias_of
from metaql.logical import AVG, COUNT, STEADY, SUM, Aggregate, Block, Relation, Scalar
from metaql.scope import Scope, Unsure, check_shape, name_of

# What stays the same when each row of a group comes k times.
_STEADY = (exp.Min, exp.Max, exp.AnyValue, exp.LogicalAnd, exp.LogicalOr)


def bind(select: exp.Select, catalogue: Catalogue) -> tuple[Scope, Block]:
    """The SELECT's names, and the SELECT as a logical block; Unsure, with the reason, when it is no such thing."""
    check_shape(select)
    scope = Scope(select, catalogue)
    return scope, _Binder(scope, catalogue).block()


def aggregates_of(select: exp.Select, catalogue: Catalogue) -> list[exp.Expr]:
    """The outermost aggregates that the SELECT itself computes, those under a window's name left out."""
    found: list[exp.Expr] = []
    pending = [child for key in ("expressions", "having", "qualify", "order") for child in _children(select, key)]
    while pending:
        node = pending.pop(0)
        if isinstance(node, exp.Query):
            continue
        if isinstance(node, exp.Window):
            pending.extend(_around(node))
        elif isinstance(node, exp.IgnoreNulls) and isinstance(node.this, exp.AnyValue):
            # any_value ignores NULLs in any case, and is parsed so.
            found.append(node)
        elif _is_aggregate(node, catalogue):
            found.append(node)
        else:
            pending.extend(node.iter_expressions())
    return found


def conjuncts_of(select: exp.Select) -> Iterator[exp.Expr]:
    """The conditions on the SELECT's rows, those of its joins included; TRUE is none."""
    where = select.args.get("where")
    roots = [join.args.get("on") for join in select.args.get("joins") or ()]
    for root in (*roots, where.this if where else None):
        if root is not None:
            yield from (one for one in _flat(root) if not (isinstance(one, exp.Boolean) and one.this))


def sum_or_average(node: exp.Expr) -> tuple[str, exp.Expr] | None:
    """(avg or sum, its argument); None for anything else."""
    if isinstance(node, exp.Avg | exp.Sum):
        return (AVG if isinstance(node, exp.Avg) else SUM), node.this
    if isinstance(node, exp.Anonymous) and name_of(node) == "mean" and len(node.expressions) == 1:
        return AVG, node.expressions[0]
    return None


class _Binder:
    def __init__(self, scope: Scope, catalogue: Catalogue) -> None:
        self._scope, self._catalogue = scope, catalogue
        self._select = scope.select

    def block(self) -> Block:
        places = aggregates_of(self._select, self._catalogue)
        keys = tuple(self._keys()) if self._select.args.get("group") else ()
        relations = tuple(
            Relation(alias_of(item, n), item, self._catalogue.unique_columns(item, self._select))
            for n, item in enumerate(self._scope.items)
        )
        return Block(
            relations,
            tuple(self._conjunct(node) for node in conjuncts_of(self._select)),
            keys if places or self._select.args.get("group") else None,
            tuple(self._aggregate(place) for place in places),
            tuple(self._outputs(places, keys)),
            self._select.args.get("having") is not None,
        )

    def _conjunct(self, node: exp.Expr) -> Scalar:
        """Aliases of the select list are visible in WHERE, but not where a condition might be moved to."""
        names = {column.name.lower() for column in node.find_all(exp.Column) if not column.table}
        if names & self._scope.aliases.keys() - self._scope.all_columns:
            raise Unsure("a condition uses an alias of the select list")
        return self._scalar(node)

    def _keys(self) -> Iterator[Scalar]:
        group = self._select.args["group"]
        if group.args.get("all"):
            for item in self._select.expressions:
                if not any(_is_aggregate(node, self._catalogue) for node in item.walk()):
                    yield self._scalar(item.unalias())
        for key in group.expressions:
            yield self._scalar(self._key(key))

    def _key(self, key: exp.Expr) -> exp.Expr:
        """A key may be given by its place in the select list, or by its alias there."""
        if isinstance(key, exp.Literal) and not key.is_string:
            number = int(key.name) - 1 if key.name.isdigit() else -1
            if not 0 <= number < len(self._select.expressions):
                raise Unsure("GROUP BY names no column of the select list")
            item: exp.Expr = self._select.expressions[number].unalias()
            return item
        if isinstance(key, exp.Column) and not key.table and key.name.lower() not in self._scope.all_columns:
            if key.name.lower() not in self._scope.aliases:
                raise Unsure(f"GROUP BY {key.name} is not known here")
            aliased: exp.Expr = self._scope.aliases[key.name.lower()]
            return aliased
        return key

    def _aggregate(self, place: exp.Expr) -> Aggregate:
        if isinstance(place.parent, exp.Filter):
            raise Unsure("FILTER chooses among the pairs")
        if isinstance(place.parent, exp.WithinGroup | exp.IgnoreNulls | exp.RespectNulls):
            raise Unsure("an ordered aggregate")
        found = sum_or_average(place)
        if found is not None and not isinstance(found[1], exp.Distinct | exp.Order):
            return Aggregate(found[0], expand(found[1], self._scope), place)
        if isinstance(place, exp.Count) and not isinstance(place.this, exp.Distinct):
            return Aggregate(COUNT, self._counted(place), place)
        if holds_product(place):
            function = place.this if isinstance(place, exp.IgnoreNulls) else place
            name = "DISTINCT" if place.find(exp.Distinct) else name_of(function)
            raise Unsure(f"{name} over pairs is not linear in them")
        call = place.this if isinstance(place, exp.IgnoreNulls) else place
        if call.args.get("count") is not None:
            raise Unsure(f"{name_of(call)} of several values depends on how often each row comes")
        if not (isinstance(call, _STEADY) or _counts_distinct(call)):
            raise Unsure(f"{name_of(call)} beside a score depends on how often each row comes")
        return Aggregate(STEADY, (), place, self._scalar(call))

    def _counted(self, place: exp.Count) -> tuple:  # type: ignore[type-arg]
        if place.args.get("big_int") is False or place.expressions:
            raise Unsure("a count of several columns")
        return () if place.this is None or isinstance(place.this, exp.Star) else expand(place.this, self._scope)

    def _outputs(self, places: list[exp.Expr], keys: tuple[Scalar, ...]) -> Iterator[Scalar]:
        """Every column outside the aggregates that is not within a key."""
        given = {self._scope.canonical(key.sql) for key in keys}
        pending = [
            child for key in ("expressions", "having", "qualify", "order") for child in _children(self._select, key)
        ]
        while pending:
            node = pending.pop()
            if any(node is place for place in places) or (keys and self._scope.canonical(node) in given):
                continue
            if self._scope.is_alias(node):
                # Looked at where it is defined.
                continue
            if isinstance(node, exp.Column | exp.Query):
                yield self._scalar(node)
            else:
                pending.extend(node.iter_expressions())

    def _scalar(self, node: exp.Expr) -> Scalar:
        return Scalar(self._scope.qualified(node), self._scope.reads(node))


def _is_aggregate(node: exp.Expr, catalogue: Catalogue) -> bool:
    # sqlglot knows which of the functions that it has classes for are aggregates; others DuckDB knows.
    if isinstance(node, exp.AggFunc):
        return True
    return isinstance(node, exp.Anonymous) and not catalogue.is_scalar(node.name)


def _children(select: exp.Select, key: str) -> list[exp.Expr]:
    value = select.args.get(key)
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _around(window: exp.Window) -> Iterator[exp.Expr]:
    """What a window reads: it runs over the groups, of which there are as many as before."""
    function = window.args["this"]
    if isinstance(function, exp.Func):
        yield from function.iter_expressions()
    else:
        yield from (child for one in function.iter_expressions() for child in one.iter_expressions())
    yield from (child for child in window.iter_expressions() if child.arg_key != "this")


def _flat(node: exp.Expr) -> Iterator[exp.Expr]:
    """The parts of a conjunction."""
    while isinstance(node, exp.Paren):
        node = node.this
    if isinstance(node, exp.And):
        yield from _flat(node.left)
        yield from _flat(node.right)
    else:
        yield node


def _counts_distinct(node: exp.Expr) -> bool:
    return isinstance(node, exp.Count) and isinstance(node.this, exp.Distinct)
