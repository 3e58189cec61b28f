"""``p2p``, ``p2b``, ``b2p`` and ``b2b`` in FROM become the SQL they are short for, which is planned like any other.

In text that is not ours to change they are macros, planned one by one (``late_planner.py``).
"""

from __future__ import annotations

import re
from typing import Any

from sqlglot import exp

from metaql.catalogue import Catalogue
from metaql.parse import parse, to_sql
from metaql.udfs.operators import DEFAULTS, Call, Operator, stands_for
from metaql.udfs.quoting import quoted
from metaql.udfs.register import OPERATORS
from metaql.udfs.sources import StoreSource

_OPERATORS = {operator.name: operator for operator in OPERATORS}
_WORDS = re.compile(rf"\b({'|'.join(_OPERATORS)})\b", re.IGNORECASE)


def expand(text: str, source: StoreSource, catalogue: Catalogue) -> str:
    """The text with a sub-query in place of each call of a short form whose arguments are constants.

    A function of that name that the user made goes before the store's, as it does in DuckDB. Other arguments, and
    calls that DuckDB will refuse, are left to the macros.
    """
    statement = parse(text) if _WORDS.search(text) else None
    if statement is None or _defines(statement.tree):
        return text
    changed = False
    for table in list(statement.tree.find_all(exp.Table)):
        operator = _operator(table, source, catalogue)
        call = _call(table.this.expressions) if operator else None
        if operator is None or call is None:
            continue
        plain = stands_for(operator, call, source, ())
        query = parse(plain)
        if query is not None and catalogue.ask(_without_averages(query.tree)) is not None:
            table.replace(exp.Subquery(this=query.tree, alias=table.args.get("alias")))
            changed = True
    return statement.prefix + to_sql(statement.tree) if changed else text


def _without_averages(query: exp.Expr) -> str:
    """A text that DuckDB can bind where it could bind the query, if it knew averages of gradients."""
    return to_sql(query.transform(lambda node: exp.AnyValue(this=node.this) if isinstance(node, exp.Avg) else node))


def _defines(tree: exp.Expr) -> bool:
    """Whether a text is kept for later: a view with a short form in it is planned each time that it is read."""
    return isinstance(tree, exp.Create) and tree.kind != "TABLE"


def _operator(table: exp.Table, source: StoreSource, catalogue: Catalogue) -> Operator | None:
    """The short form that an item of FROM calls; None for anything else."""
    function = table.this
    known = {"this", "db", "catalog", "alias"}
    if not isinstance(function, exp.Anonymous) or any(value and key not in known for key, value in table.args.items()):
        return None
    operator = _OPERATORS.get(function.name.lower())
    return operator if operator and _is_ours(table, source, catalogue) else None


def _is_ours(table: exp.Table, source: StoreSource, catalogue: Catalogue) -> bool:
    qualifiers = [part.lower() for part in (table.catalog, table.db) if part]
    if qualifiers:
        return qualifiers in ([source.name.lower()], [source.name.lower(), "main"])
    own = catalogue.database.own
    if own is None:
        return False
    places = (f"{quoted(database)}.{quoted(schema)}" for database, schema in own)
    return all(catalogue.ask(f"SELECT * FROM {place}.{to_sql(table.this)}") is None for place in places)


def _call(arguments: list[exp.Expr]) -> Call | None:
    """The call's arguments, by place or by name; None when they are no constants, or not those of a short form."""
    given: dict[str, Any] = {}
    for place, argument in enumerate(arguments):
        named = isinstance(argument, exp.PropertyEQ | exp.Kwarg)
        name = argument.this.name.lower() if named else list(DEFAULTS)[place] if place < len(DEFAULTS) else ""
        value = argument.expression if named else argument
        if name not in DEFAULTS or name in given or not _is_constant(value, name):
            return None
        given[name] = None if isinstance(value, exp.Null) else int(value.name) if name == "checkpoint" else value.name
    return Call(**given)


def _is_constant(value: exp.Expr, name: str) -> bool:
    if name == "checkpoint" and isinstance(value, exp.Literal):
        return bool(value.is_int)
    return isinstance(value, exp.Null) or (isinstance(value, exp.Literal) and value.is_string)
