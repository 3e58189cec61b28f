"""What relations hold, as DuckDB itself says: any item of FROM that DuckDB can bind is known here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import duckdb
from sqlglot import exp

from metaql.parse import to_sql
from metaql.udfs.references import GRADIENT

# The columns, in lower case, of each relation by its alias; with DuckDB's names of their types.
Columns = dict[str, dict[str, str]]
# Binds a query, running nothing: its columns' names and types.
Answer = list[tuple[str, str]] | None
Describe = Callable[[str], list[tuple[str, str]]]


class Catalogue:
    """Asks DuckDB; ``describe`` runs on the connection and in the frame of the query.

    ``check_pattern`` raises UnknownNameError for a layer pattern that selects nothing.
    """

    def __init__(
        self,
        describe: Describe,
        scalar_functions: Callable[[], frozenset[str]],
        check_pattern: Callable[[str], object],
    ) -> None:
        self._describe = describe
        self._scalar_functions = scalar_functions
        self.check_pattern = check_pattern
        self.asked: dict[str, Answer] = {}

    def ask(self, query: str) -> Answer:
        """The columns of a query; None where DuckDB can't bind it. Kept in ``asked``."""
        if query not in self.asked:
            try:
                self.asked[query] = self._describe(query)
            except duckdb.Error:
                self.asked[query] = None
        return self.asked[query]

    def is_scalar(self, name: str) -> bool:
        """Whether a function of this name is surely no aggregate."""
        return name.lower() in self._scalar_functions()

    def columns(self, select: exp.Select) -> Columns | None:
        """The columns of each relation in FROM; None where DuckDB can't bind one of them by itself."""
        items = [part.this for part in (select.args.get("from_"), *(select.args.get("joins") or ())) if part]
        with_ = visible_ctes(select)
        found: Columns = {}
        for place, item in enumerate(items):
            columns = self.ask(f"{with_}SELECT * FROM {_without_parameters(item)}")
            if columns is None:
                return None
            found[alias_of(item, place)] = {name.lower(): type_ for name, type_ in columns}
        return found

    def is_gradient(self, expression: exp.Expr, select: exp.Select) -> bool:
        """Whether an expression over the SELECT's relations is a gradient."""
        if isinstance(expression, exp.Literal | exp.Boolean | exp.Null):
            return False
        if isinstance(expression, exp.Anonymous) and expression.name.lower() == "inner_product":
            # The planner's own scores, mostly; binding one with its query side again takes DuckDB 0.7 ms.
            return False
        source = select.args.get("from_")
        parts = [source, *(select.args.get("joins") or ())] if source else []
        from_ = " ".join(_without_parameters(part) for part in parts)
        columns = self.ask(f"{visible_ctes(select)}SELECT {_without_parameters(expression)} {from_}")
        return columns is not None and columns[0][1] == GRADIENT


def alias_of(item: exp.Expr, place: int) -> str:
    """The name of an item of FROM; one that no column can be qualified with where it has none."""
    return item.alias_or_name or f"({place})"


def visible_ctes(select: exp.Expr) -> str:
    """The WITH clause that a SELECT's FROM is bound under: its own, and those of the queries around it."""
    ctes: list[str] = []
    query: exp.Expr | None = select
    while query is not None:
        with_ = query.args.get("with_")
        if isinstance(with_, exp.With):
            ctes = [_without_parameters(cte) for cte in _before(with_, select)] + ctes
        query = query.parent
    return f"WITH {', '.join(ctes)} " if ctes else ""


def _before(with_: exp.With, select: exp.Expr) -> list[exp.Expr]:
    """All CTEs, or those before the one that the SELECT itself stands in."""
    around = {id(node) for node in _ancestors(select)}
    inside = next((place for place, cte in enumerate(with_.expressions) if id(cte) in around), None)
    return list(with_.expressions[:inside])


def _ancestors(node: exp.Expr) -> Iterator[exp.Expr]:
    inner: exp.Expr | None = node
    while inner is not None:
        yield inner
        inner = inner.parent


def _without_parameters(node: exp.Expr) -> str:
    """SQL with NULL for each parameter: types of columns hardly ever depend on them, and they need no values then."""
    return to_sql(node.copy().transform(lambda one: exp.Null() if isinstance(one, exp.Placeholder) else one))
