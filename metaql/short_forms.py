"""``p2b``, ``elite`` and the other table functions in FROM become the SQL they are short for, planned like any other.

In text that is not ours to change they are macros, planned one by one (``late_planner.py``).
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from sqlglot import exp

from metaql.catalogue import Catalogue, visible_ctes, without_parameters
from metaql.errors import QueryError, UnknownNameError
from metaql.parse import parse, to_sql
from metaql.udfs.quoting import quoted
from metaql.udfs.register import TABLE_FUNCTIONS
from metaql.udfs.sources import StoreSource
from metaql.udfs.table_functions import Asked, Given, TableFunction

_FUNCTIONS = {function.name: function for function in TABLE_FUNCTIONS}
_WORDS = re.compile(rf"\b({'|'.join(_FUNCTIONS)})\b", re.IGNORECASE)

_WITH_RELATIONS = re.compile(rf"\b({'|'.join(one.name for one in TABLE_FUNCTIONS if one.relations)})\b", re.IGNORECASE)


def expand(text: str, source: StoreSource, catalogue: Catalogue) -> str:
    """The text with a sub-query in place of each call of a table function whose arguments are constants.

    Arguments of those that take relations may be anything. A function of that name that the user made goes before the
    store's, as it does in DuckDB. Other arguments, and calls that DuckDB will refuse, are left to the macros.
    """
    statement = parse(text) if _WORDS.search(text) else None
    if statement is None:
        return text
    kept, changed = _defines(statement.tree), False
    # Inner ones first: they may be in the arguments of others.
    for table in reversed(list(statement.tree.find_all(exp.Table))):
        function = _function(table, source, catalogue)
        call = _call(function, table.this.expressions) if function else None
        if function is None or call is None or (kept and not _only_here(call)):
            continue
        query = _query(function, call, table, source, catalogue)
        if query is not None:
            table.replace(exp.Subquery(this=query, alias=table.args.get("alias")))
            changed = True
    return statement.prefix + to_sql(statement.tree) if changed else text


def may_hold_relations(text: str) -> bool:
    """Whether a text may give relations to a function, which DuckDB can't read as it is written."""
    return _WITH_RELATIONS.search(text) is not None


def _query(
    function: TableFunction, call: Any, table: exp.Table, source: StoreSource, catalogue: Catalogue
) -> exp.Expr | None:
    """What stands for the call; None where DuckDB could not bind it, as macros tell best why."""
    asked = Asked(function.name, call, source)
    if function.relations:
        asked = Asked(function.name, call, source, columns=_columns(asked, function, table, catalogue))
    query = parse(function.sql(asked))
    if query is None or function.relations:
        return None if query is None else query.tree
    return query.tree if catalogue.ask(_without_averages(query.tree)) is not None else None


def _columns(asked: Asked, function: TableFunction, table: exp.Table, catalogue: Catalogue) -> dict[str, list[str]]:
    """Those of each relation among the arguments. DuckDB's error where it can't bind one, in which only that stands."""
    found: dict[str, list[str]] = {}
    for argument in function.relations:
        if getattr(asked.call, argument) is not None:
            query = parse(f"SELECT * FROM {asked.relation(argument, '')}")
            text = asked.relation(argument, "") if query is None else without_parameters(query.tree)
            found[argument] = [name for name, _ in catalogue.database.describe(f"{visible_ctes(table)}{text}")]
    return found


def _without_averages(query: exp.Expr) -> str:
    """A text that DuckDB can bind where it could bind the query, if it knew averages of gradients."""
    return to_sql(query.transform(lambda node: exp.AnyValue(this=node.this) if isinstance(node, exp.Avg) else node))


def _defines(tree: exp.Expr) -> bool:
    """Whether a text is kept for later: a view with a short form in it is planned each time that it is read."""
    return isinstance(tree, exp.Create) and tree.kind != "TABLE"


def _only_here(call: Any) -> bool:
    """Whether no macro could take the arguments."""
    return any(isinstance(value, Given) for value in vars(call).values())


def _function(table: exp.Table, source: StoreSource, catalogue: Catalogue) -> TableFunction | None:
    """The table function that an item of FROM calls; None for anything else."""
    called = table.this
    known = {"this", "db", "catalog", "alias"}
    if not isinstance(called, exp.Anonymous) or any(value and key not in known for key, value in table.args.items()):
        return None
    function = _FUNCTIONS.get(called.name.lower())
    return function if function and _is_ours(table, source, catalogue) else None


def _is_ours(table: exp.Table, source: StoreSource, catalogue: Catalogue) -> bool:
    qualifiers = [part.lower() for part in (table.catalog, table.db) if part]
    if qualifiers:
        return qualifiers in ([source.name.lower()], [source.name.lower(), "main"])
    own = catalogue.database.own
    if own is None:
        return False
    places = (f"{quoted(database)}.{quoted(schema)}" for database, schema in own)
    return all(catalogue.ask(f"SELECT * FROM {place}.{to_sql(table.this)}") is None for place in places)


def _call(function: TableFunction, arguments: list[exp.Expr]) -> Any:
    """The call's arguments, by place or by name; None when macros must take them, or say what is wrong with them."""
    given: dict[str, Any] = {}
    names = list(function.defaults)
    for place, argument in enumerate(arguments):
        named = isinstance(argument, exp.PropertyEQ | exp.Kwarg)
        name = argument.this.name.lower() if named else names[place] if place < len(names) else ""
        if name not in names or name in given:
            if function.relations:
                raise _not_an_argument(function, name, name in given)
            return None
        value = _value(function, name, argument.expression if named else argument)
        if isinstance(value, Given) and not function.relations:
            return None
        given[name] = value
    return function.call(**given)


def _value(function: TableFunction, name: str, value: exp.Expr) -> Any:
    """A constant's value; SQL for others."""
    if name in function.relations:
        if isinstance(value, exp.Column):
            return ".".join(quoted(part.name) for part in value.parts)
        if isinstance(value, exp.Query):
            return Given(to_sql(value.unnest() if isinstance(value, exp.Subquery) else value))
        if isinstance(value, exp.EQ):
            written = f"{to_sql(value.this)} := …"
            raise QueryError(f"{function.name}(…): an argument is given its value by :=, so write {written}")
    kind = dict(zip(function.defaults, function.types, strict=True))[name] if function.types else None
    known, constant = _constant(value)
    fits = kind is None or constant is None or type(constant) is {"VARCHAR": str, "BIGINT": int}[kind]
    return constant if known and fits else Given(to_sql(value))


def _constant(value: exp.Expr) -> tuple[bool, Any]:
    """Whether it is a constant, and its value."""
    if isinstance(value, exp.Null):
        return True, None
    if isinstance(value, exp.Boolean):
        return True, bool(value.this)
    if isinstance(value, exp.Neg):
        known, number = _constant(value.this)
        return (known, -number) if type(number) in (int, float) else (False, None)
    if not isinstance(value, exp.Literal):
        return False, None
    return True, value.name if value.is_string else int(value.name) if value.is_int else float(value.name)


def _not_an_argument(function: TableFunction, name: str, twice: bool) -> QueryError:
    names = list(function.defaults)
    if twice:
        return QueryError(f"{function.name}(…): {name} is given twice")
    if not name:
        return QueryError(f"{function.name}(…) has {len(names)} arguments: {', '.join(names)}")
    close = difflib.get_close_matches(name, names, 1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return UnknownNameError(f"{function.name}(…) has no argument {name}.{hint} It has {', '.join(names)}")
