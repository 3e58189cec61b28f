"""Takes sub-queries, CTEs and the user's views into the query that reads them, so that the rules see one block.

Only what joins and filters can be taken in, and what has a single row for sure. All else stays a relation of its
own, as it is anyway: nothing is lost then but the chance to plan both together.
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from metaql.algebra import PRODUCTS
from metaql.bind import aggregates_of
from metaql.catalogue import Catalogue, Columns, alias_of, cte_of, is_cte
from metaql.compile import read_from
from metaql.parse import parse
from metaql.scope import VOLATILE, Unsure, check_join, name_of
from metaql.substitute import columns_of, put
from metaql.udfs.aggregates import MEAN
from metaql.udfs.aggregates import SUM as TOTAL

_PLAIN = frozenset({"expressions", "from_", "joins", "where"})
_OF_GRADIENTS = PRODUCTS | {MEAN, TOTAL, "norm", "layers", "precondition"}


def inline(select: exp.Select, catalogue: Catalogue) -> None:
    """Takes in what joins and filters, where the SELECT aggregates over it.

    Unsure when something can't be told; the SELECT may be half done then.
    """
    for join in select.args.get("joins") or ():
        check_join(join)
    conditions_for_using(select, catalogue)
    if aggregates_of(select, catalogue):
        _until_done(select, catalogue, single=False)


def inline_single_rows(select: exp.Select, catalogue: Catalogue) -> bool:
    """Takes in relations of one row; whether there was any."""
    try:
        for join in select.args.get("joins") or ():
            check_join(join)
        if not any(query is not None for query in (_query_of(item, select, catalogue) for item in _items(select))):
            return False
        conditions_for_using(select, catalogue)
        return _until_done(select, catalogue, single=True)
    except Unsure:
        return False


def _until_done(select: exp.Select, catalogue: Catalogue, single: bool) -> bool:
    changed = False
    while any(_inline(select, item, catalogue, single) for item in _items(select)):
        changed = True
    return changed


def conditions_for_using(select: exp.Select, catalogue: Catalogue) -> None:
    """JOIN … USING (c) as ON l.c = r.c, where c alone then is l.c. Unsure, with nothing changed, where l is not clear.

    A comma binds looser than JOIN: l is one of the relations since the last one.
    """
    joins = select.args.get("joins") or []
    if not any(join.args.get("using") for join in joins):
        return
    columns = catalogue.columns(select)
    if columns is None or any(item.is_star for item in select.expressions):
        raise Unsure("USING merges columns")
    aliases = [alias_of(item, n) for n, item in enumerate(_items(select))]
    found: list[tuple[exp.Join, str, str, str]] = []
    segment, merged = aliases[:1], dict[str, str]()
    for alias, join in zip(aliases[1:], joins, strict=True):
        if _is_comma(join):
            segment, merged = [alias], {}
            continue
        for name in [each.name.lower() for each in join.args.get("using") or ()]:
            owners = [merged[name]] if name in merged else [one for one in segment if name in columns[one]]
            if len(owners) != 1 or aliases.count(owners[0]) > 1 or owners[0].startswith("(") or alias.startswith("("):
                raise Unsure("USING merges columns")
            merged[name] = owners[0]
            found.append((join, name, owners[0], alias))
        segment = [*segment, alias]
    alone = [column for column in columns_of(select) if len(column.parts) == 1]
    meant = [(column, left) for column in alone for _, name, left, _ in found if column.name.lower() == name]
    if any(len({left for one, left in meant if one is column}) > 1 for column, _ in meant):
        raise Unsure("USING merges columns")
    for column, left in meant:
        column.set("table", exp.to_identifier(left))
    for join, name, left, right in found:
        condition = exp.EQ(this=exp.column(name, left), expression=exp.column(name, right))
        join.set("on", exp.and_(join.args["on"], condition) if join.args.get("on") else condition)
        join.set("using", None)


def _is_comma(join: exp.Join) -> bool:
    return not any(join.args.get(key) for key in ("kind", "side", "method", "on", "using"))


@dataclass
class _Inner:
    """A query that is to be taken in: what its columns are, and what its relations hold."""

    query: exp.Select
    alias: str
    outputs: dict[str, exp.Expr]
    columns: Columns


def _items(select: exp.Select) -> list[exp.Expr]:
    parts = [select.args.get("from_"), *(select.args.get("joins") or ())]
    return [part.this for part in parts if part is not None]


def _inline(select: exp.Select, item: exp.Expr, catalogue: Catalogue, single: bool) -> bool:
    query = _query_of(item, select, catalogue)
    outer = catalogue.columns(select) if query is not None else None
    if query is None or outer is None:
        return False
    query.parent = select
    aggregates = aggregates_of(query, catalogue)
    if single != _has_one_row(query, aggregates) or (aggregates and not single):
        return False
    known = {key for key, value in query.args.items() if value}
    known -= {"order"} if not query.args.get("limit") else set()
    volatile = any(name_of(node) in VOLATILE for node in query.find_all(exp.Func))
    if not known <= _PLAIN or volatile or query.find(exp.Window, exp.Unnest, exp.TableSample):
        return False
    alias = next(alias_of(one, n) for n, one in enumerate(_items(select)) if one is item)
    columns = catalogue.columns(query) if query.args.get("from_") else {}
    outputs = _outputs(query, item, columns) if columns is not None else None
    if columns is None or outputs is None or not _is_of_gradients(query, outputs):
        return False
    inner = _Inner(query, alias, outputs, columns)
    others = {name: held for name, held in outer.items() if name != alias}
    if single:
        return _take_single(select, item, inner, others, catalogue)
    return _take_plain(select, item, inner, others, catalogue)


def _query_of(item: exp.Expr, select: exp.Select, catalogue: Catalogue) -> exp.Select | None:
    """A copy of the SELECT that an item of FROM stands for: a sub-query's, a CTE's or a view's."""
    found: exp.Expr | None = item.this if isinstance(item, exp.Subquery | exp.Lateral) else None
    found = found.this if isinstance(found, exp.Subquery) and isinstance(item, exp.Lateral) else found
    if any(item.args.get(key) for key in ("joins", "pivots", "sample", "laterals", "ordinality", "outer")):
        return None
    if isinstance(item, exp.Table) and isinstance(item.this, exp.Identifier):
        cte = cte_of(item, select)
        if cte is not None and (cte.args["alias"].columns or _reads_later_ctes(cte)):
            return None
        found = cte.this if cte is not None else _view(item, select, catalogue)
    while isinstance(found, exp.Subquery) and not found.alias:
        found = found.this
    return found.copy() if isinstance(found, exp.Select) else None


def _reads_later_ctes(cte: exp.CTE) -> bool:
    """Whether its names would mean something else where it is used."""
    with_ = cte.parent
    assert isinstance(with_, exp.With)
    later = {one.alias.lower() for one in with_.expressions[with_.expressions.index(cte) :]}
    return any(not table.db and table.name.lower() in later for table in cte.find_all(exp.Table))


def _view(item: exp.Table, select: exp.Select, catalogue: Catalogue) -> exp.Expr | None:
    """A view of the user's own, unless a name in it means something else here."""
    text = catalogue.view(item.name.lower()) if not item.db and catalogue.database.own else None
    statement = parse(text) if text is not None else None
    if statement is None or not isinstance(statement.tree, exp.Create):
        return None
    if isinstance(statement.tree.this, exp.Schema):
        return None
    query = statement.tree.expression
    return None if any(is_cte(table, select) for table in query.find_all(exp.Table)) else query


def _has_one_row(query: exp.Select, aggregates: list[exp.Expr]) -> bool:
    """Whether it has neither more nor fewer rows than one: aggregates over everything, or no FROM at all."""
    if any(query.args.get(key) for key in ("group", "having", "limit", "offset", "qualify")):
        return False
    if query.args.get("from_") is None:
        return not query.args.get("where") and not aggregates
    return bool(aggregates) and all(
        any(node is one for one in aggregates for node in item.walk()) for item in query.expressions
    )


def _outputs(query: exp.Select, item: exp.Expr, columns: Columns) -> dict[str, exp.Expr] | None:
    """The query's columns by their names in lower case; None where these can't be told."""
    found: list[tuple[str, exp.Expr]] = []
    for expression in query.expressions:
        star = _star(expression, columns) if expression.is_star else None
        if star is not None:
            found += star
        elif expression.is_star or expression.find(exp.Columns):
            return None
        else:
            found.append((expression.alias_or_name.lower(), expression.unalias()))
    aliased = item.args.get("alias")
    names = [column.name.lower() for column in aliased.args.get("columns") or ()] if aliased else []
    found = [(names[n] if n < len(names) else name, one) for n, (name, one) in enumerate(found)]
    outputs = {name: one for name, one in found if name}
    return outputs if len(outputs) == sum(1 for name, _ in found if name) else None


def _star(expression: exp.Expr, columns: Columns) -> list[tuple[str, exp.Expr]] | None:
    star = expression.this if isinstance(expression, exp.Column) else expression
    if any(star.args.values()):
        return None
    wanted = expression.table.lower() if isinstance(expression, exp.Column) else ""
    return [
        (name, exp.column(exp.to_identifier(name, quoted=True), alias))
        for alias, names in columns.items()
        if wanted in ("", alias.lower())
        for name in names
    ]


def _is_of_gradients(query: exp.Select, outputs: dict[str, exp.Expr]) -> bool:
    nodes = [*query.walk(), *(node for one in outputs.values() for node in one.walk())]
    return any(
        (isinstance(node, exp.Anonymous) and name_of(node) in _OF_GRADIENTS)
        or (isinstance(node, exp.Column) and node.name.lower() == "gradient")
        for node in nodes
    )


def _take_single(select: exp.Select, item: exp.Expr, inner: _Inner, others: Columns, catalogue: Catalogue) -> bool:
    """A column of a single row is a scalar sub-query, or the expression itself where that needs no FROM."""
    if inner.query.args.get("from_") is not None and len(_items(select)) == 1:
        return False
    values: dict[str, exp.Expr] = {}
    for name, output in inner.outputs.items():
        query = inner.query.copy()
        query.set("order", None)
        query.set("expressions", [output.copy()])
        values[name] = exp.Subquery(this=query) if query.args.get("from_") is not None else exp.paren(output.copy())
    if not put(select, inner.alias, values, others, catalogue):
        return False
    _splice(select, item, [], [])
    return True


def _take_plain(select: exp.Select, item: exp.Expr, inner: _Inner, others: Columns, catalogue: Catalogue) -> bool:
    """What joins and filters: its relations, under names that are free, and its conditions."""
    for join in inner.query.args.get("joins") or ():
        check_join(join)
        if join.args.get("using"):
            return False
    items = _items(inner.query)
    if not all(isinstance(one, exp.Table | exp.Subquery) for one in items):
        return False
    renaming = _fresh(inner.columns, others)
    where = inner.query.args.get("where")
    ons = [join.args["on"] for join in inner.query.args.get("joins") or () if join.args.get("on")]
    conditions = [*([where.this] if where else []), *ons]
    texts = [*conditions, *inner.outputs.values()]
    if any(one.find(exp.Query) for one in texts) and any(before != after for before, after in renaming.items()):
        # A nested query may read relations under their old names.
        return False
    if not all(_known(one, inner.columns, others) for one in texts):
        return False
    values = {name: _renamed(one, inner.columns, renaming) for name, one in inner.outputs.items()}
    if not put(select, inner.alias, values, others, catalogue):
        return False
    for number, one in enumerate(items):
        before = alias_of(one, number)
        one.set("alias", exp.TableAlias(this=exp.to_identifier(renaming[before]), columns=_column_aliases(one)))
    _splice(select, item, items, [_renamed(one, inner.columns, renaming) for one in conditions])
    return True


def _column_aliases(item: exp.Expr) -> list[exp.Expr]:
    alias = item.args.get("alias")
    return list(alias.args.get("columns") or ()) if alias is not None else []


def _fresh(columns: Columns, others: Columns) -> dict[str, str]:
    taken = {name.lower() for name in others}
    renaming: dict[str, str] = {}
    for alias in columns:
        name, number = alias, 1
        while name.lower() in taken or not name.replace("_", "").isalnum():
            number += 1
            name = f"{''.join(c for c in alias if c.isalnum() or c == '_') or 'inner'}_{number}"
        renaming[alias] = name
        taken.add(name.lower())
    return renaming


def _known(node: exp.Expr, columns: Columns, others: Columns) -> bool:
    """Whether every name outside of nested queries is that of one column: of the query's own relations, or of one
    beside the query, which it then says.
    """
    return all(
        _owner(column, columns) is not None or (len(column.parts) > 1 and _owner(column, others) is not None)
        for column in columns_of(node)
    )


def _owner(column: exp.Column, columns: Columns) -> str | None:
    first = column.parts[0].name.lower()
    if len(column.parts) > 1:
        named = [alias for alias in columns if alias.lower() == first]
        return named[0] if named else None
    owners = [alias for alias, names in columns.items() if first in names]
    return owners[0] if len(owners) == 1 else None


def _renamed(node: exp.Expr, columns: Columns, renaming: dict[str, str]) -> exp.Expr:
    holder = exp.paren(node.copy())
    for column in columns_of(holder):
        owner = _owner(column, columns)
        if owner is None:
            continue
        qualified = len(column.parts) > 1
        parts = [part.copy() for part in (column.parts[1:] if qualified else column.parts)]
        qualified_column = exp.column(parts[0], renaming[owner])
        column.replace(exp.Dot.build([qualified_column, *parts[1:]]) if len(parts) > 1 else qualified_column)
    return holder if isinstance(holder.this, exp.Binary | exp.Case | exp.Not) else holder.this.copy()


def _splice(select: exp.Select, item: exp.Expr, items: list[exp.Expr], conditions: list[exp.Expr]) -> None:
    """Puts other items in an item's place; every condition of a join goes to WHERE, which is the same."""
    kept = list(_items(select))
    place = next(n for n, one in enumerate(kept) if one is item)
    kept[place : place + 1] = items
    where = select.args.get("where")
    all_conditions = [join.args["on"] for join in select.args.get("joins") or () if join.args.get("on")]
    all_conditions = [*([where.this] if where else []), *all_conditions, *conditions]
    read_from(select, kept, all_conditions)
