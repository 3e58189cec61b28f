"""Expressions in place of names: of a relation that is taken in, and of the select list's own."""

from __future__ import annotations

from collections.abc import Iterator

from sqlglot import exp

from metaql.catalogue import Catalogue, Columns
from metaql.compile import keep_name
from metaql.scope import Unsure


def expand_aliases(select: exp.Select, catalogue: Catalogue) -> None:
    """Puts expressions in place of the names that they have in the same select list.

    DuckDB does not know such a name if there is a sub-query behind it, which is what a gathered side becomes.
    """
    columns: Columns | None = None
    for place, item in enumerate(select.expressions):
        for column in list(item.find_all(exp.Column)):
            before = [one for one in select.expressions[:place] if isinstance(one, exp.Alias)]
            named = [one for one in before if len(column.parts) == 1 and one.alias.lower() == column.name.lower()]
            if not named or column.find_ancestor(exp.Query) is not select:
                continue
            columns = columns if columns is not None else catalogue.columns(select)
            if columns is None or any(column.name.lower() in names for names in columns.values()):
                continue
            keep_name(select, column)
            column.replace(exp.paren(named[-1].this.copy()))


def put(select: exp.Select, alias: str, values: dict[str, exp.Expr], others: Columns, catalogue: Catalogue) -> bool:
    """Puts the values in place of the relation's columns; False, with nothing changed, if one can't be told."""
    found: list[exp.Column] = []
    for column in _outer_columns(select, alias, values, catalogue):
        if len(column.parts) == 1:
            if any(column.name.lower() in names for names in others.values()):
                return False
            if _is_alias(column, select):
                continue
        name = (column.parts[1] if len(column.parts) > 1 else column.parts[0]).name.lower()
        if name not in values or len(column.parts) > 2:
            return False
        found.append(column)
    if any(item.is_star for item in select.expressions):
        return False
    if any(column.find_ancestor(exp.Lambda) for column in found):
        return False
    for column in found:
        keep_name(select, column)
        name = (column.parts[1] if len(column.parts) > 1 else column.parts[0]).name.lower()
        column.replace(values[name].copy())
    return True


def _outer_columns(
    select: exp.Select, alias: str, values: dict[str, exp.Expr], catalogue: Catalogue
) -> Iterator[exp.Column]:
    """Columns of the relation, in the SELECT and in the queries nested in it."""
    with_ = select.args.get("with_")
    for column in select.find_all(exp.Column):
        if any(one is with_ for one in _upwards(column, select)):
            continue
        if (len(column.parts) > 1 and column.parts[0].name.lower() == alias.lower()) or (
            len(column.parts) == 1 and column.name.lower() in values and not _inside(column, select, catalogue)
        ):
            yield column


def _inside(column: exp.Column, select: exp.Select, catalogue: Catalogue) -> bool:
    """Whether a name without qualifier belongs to a nested query."""
    for query in _upwards(column, select):
        if isinstance(query, exp.Select):
            columns = catalogue.columns(query)
            if columns is None or any(column.name.lower() in names for names in columns.values()):
                return True
    return False


def _upwards(node: exp.Expr, end: exp.Expr) -> Iterator[exp.Expr]:
    one = node.parent
    while one is not None and one is not end:
        yield one
        one = one.parent


def _is_alias(column: exp.Column, select: exp.Select) -> bool:
    """Whether a name in ORDER BY is an alias of the select list; elsewhere it would be either, which is Unsure."""
    aliased = [
        item for item in select.expressions if isinstance(item, exp.Alias) and item.alias.lower() == column.name.lower()
    ]
    if not aliased or any(one is column for one in aliased[0].walk()):
        return False
    if isinstance(aliased[0].this, exp.Column) and aliased[0].this.name.lower() == column.name.lower():
        return False
    around = next((one for one in _upwards(column, select) if one.parent is select), None)
    if around is None or around.arg_key == "order":
        return True
    if around.arg_key in ("group", "having", "qualify", "where"):
        raise Unsure(f"{column.name} is a column and an alias")
    return False


def columns_of(node: exp.Expr) -> Iterator[exp.Column]:
    """The columns in an expression or a SELECT, those of nested queries left out."""
    pending = [node]
    while pending:
        one = pending.pop()
        if isinstance(one, exp.Column):
            yield one
        elif one is node or not isinstance(one, exp.Query | exp.With):
            pending.extend(list(one.iter_expressions()))
