"""What relations hold, as DuckDB itself says: any item of FROM that DuckDB can bind is known here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import duckdb
from sqlglot import exp

from metaql.parse import to_sql
from metaql.storage.tables import RELATIONS
from metaql.udfs.quoting import quoted
from metaql.udfs.references import GRADIENT

# The columns, in lower case, of each relation by its alias; with DuckDB's names of their types.
Columns = dict[str, dict[str, str]]
# Binds a query, running nothing: its columns' names and types.
Described = list[tuple[str, str]] | None
# What tells the rows of a relation of the store apart. A split's are added to these.
_UNIQUE = {
    "samples": frozenset({"sample_id", "split"}),
    "checkpoints": frozenset({"checkpoint"}),
    "layers": frozenset({"layer"}),
    "curvature": frozenset({"checkpoint", "method", "layer"}),
    "gradients": frozenset({"sample_id", "split", "checkpoint", "step"}),
    "outputs": frozenset({"sample_id", "split", "checkpoint", "step"}),
    "embeddings": frozenset({"sample_id", "split", "checkpoint", "layer"}),
}


class Database(Protocol):
    """The DuckDB that a query will run in, seen from that query's place in the user's program."""

    def describe(self, query: str) -> list[tuple[str, str]]:
        """Names and types of a query's columns; runs nothing."""

    def answer(self, query: str) -> list[tuple[Any, ...]]:
        """A query's rows."""

    def is_scalar(self, name: str) -> bool:
        """Whether a function of this name, in lower case, is surely no aggregate."""

    def is_relation(self, database: str, schema: str, name: str) -> bool:
        """Whether a schema has a table or a view of that name."""

    def views(self) -> dict[str, str]:
        """The user's own views by name, in lower case: their CREATE statements."""

    @property
    def own(self) -> tuple[tuple[str, str], ...] | None:
        """The databases and schemas where names are looked up before the store's are; None where the user's settings
        decide that."""


@dataclass(frozen=True)
class Stretch:
    """Rows of a store that follow one another."""

    store: int
    first: int
    rows: int


@dataclass(frozen=True)
class Names:
    """What the planner knows of a store by heart: its database, its splits, and whether a layer pattern selects."""

    database: str
    splits: tuple[str, ...]
    check_pattern: Callable[[str], object]
    # The rows of a split, if it takes less to score them all than so many of them; None if not, or if they lie apart.
    scan: Callable[[str, float], Stretch | None] = lambda split, rows: None
    # What was asked of the store's own relations, which never change while they are open. All splits have the same
    # columns, which are kept by an empty name.
    columns: dict[str, dict[str, str]] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)


class Catalogue:
    """Asks DuckDB, and keeps what it answered in ``asked``, ``viewed`` and ``shadowed``."""

    def __init__(self, database: Database, names: Names) -> None:
        self.database, self.names = database, names
        self.asked: dict[str, Described] = {}
        self.viewed: dict[str, str | None] = {}
        self.shadowed: dict[str, bool] = {}
        self._split_names = frozenset(split.lower() for split in names.splits) - frozenset(RELATIONS)

    def ask(self, query: str) -> Described:
        """The columns of a query; None where DuckDB can't bind it."""
        if query not in self.asked:
            try:
                self.asked[query] = self.database.describe(query)
            except duckdb.Error:
                self.asked[query] = None
        return self.asked[query]

    def view(self, name: str) -> str | None:
        """The CREATE statement of a view of the user's own that has to do with gradients. Kept in ``viewed``."""
        if name not in self.viewed:
            self.viewed[name] = self.database.views().get(name)
        return self.viewed[name]

    def is_scalar(self, name: str) -> bool:
        """Whether a function of this name is surely no aggregate."""
        return self.database.is_scalar(name.lower())

    def columns(self, select: exp.Select) -> Columns | None:
        """The columns of each relation in FROM; None where DuckDB can't bind one of them by itself."""
        items = [part.this for part in (select.args.get("from_"), *(select.args.get("joins") or ())) if part]
        found: Columns = {}
        for place, item in enumerate(items):
            columns = self._stored_columns(item, select) or self._columns(items, place, select)
            if columns is None:
                return None
            found[alias_of(item, place)] = columns
        return found

    def _stored_columns(self, item: exp.Expr, select: exp.Select) -> dict[str, str] | None:
        name = self.stored(item, select)
        if name is None or (item.args.get("alias") and item.args["alias"].columns):
            return None
        key = "" if name in self._split_names else name
        if key not in self.names.columns:
            # Not kept among what was asked: it can't change, and need not be asked again for a plan to hold.
            described = self.database.describe(f"SELECT * FROM {quoted(self.names.database)}.main.{quoted(name)}")
            self.names.columns[key] = {column.lower(): type_ for column, type_ in described}
        return self.names.columns[key]

    def _columns(self, items: list[exp.Expr], place: int, select: exp.Select) -> dict[str, str] | None:
        with_, item = visible_ctes(select), items[place]
        columns = self.ask(f"{with_}SELECT * FROM {without_parameters(item)}")
        if columns is None and place and item.alias:
            # A sub-query may read the relations before it.
            before = ", ".join(map(without_parameters, items[: place + 1]))
            columns = self.ask(f"{with_}SELECT {quoted(item.alias)}.* FROM {before}")
        return None if columns is None else {name.lower(): type_ for name, type_ in columns}

    def is_gradient(self, expression: exp.Expr, select: exp.Select) -> bool:
        """Whether an expression over the SELECT's relations is a gradient."""
        if isinstance(expression, exp.Literal | exp.Boolean | exp.Null):
            return False
        if isinstance(expression, exp.Anonymous) and expression.name.lower() == "inner_product":
            # The planner's own scores, mostly; binding one with its query side again takes DuckDB 0.7 ms.
            return False
        source = select.args.get("from_")
        parts = [source, *(select.args.get("joins") or ())] if source else []
        from_ = " ".join(without_parameters(part) for part in parts)
        columns = self.ask(f"{visible_ctes(select)}SELECT {without_parameters(expression)} {from_}")
        return columns is not None and columns[0][1] == GRADIENT

    def unique_columns(self, item: exp.Expr, select: exp.Select) -> frozenset[str]:
        """The columns that tell the rows of a relation of the store apart; none for any other."""
        name = self.stored(item, select)
        if name is None:
            return frozenset()
        return _UNIQUE.get(name) or (frozenset({"sample_id"}) if name in self._split_names else frozenset())

    def stored(self, item: exp.Expr, select: exp.Select) -> str | None:
        """The name of the store's relation that an item of FROM is, in lower case; None for any other."""
        if not isinstance(item, exp.Table) or not isinstance(item.this, exp.Identifier):
            return None
        name, database = item.name.lower(), self.names.database.lower()
        if name not in _UNIQUE and name != "steps" and name not in self._split_names:
            return None
        if item.db:
            qualifiers = [part.lower() for part in (item.catalog, item.db) if part]
            return name if qualifiers in ([database], [database, "main"]) else None
        if self.database.own is None or is_cte(item, select):
            return None
        return None if self.is_shadowed(name) else name

    def is_shadowed(self, name: str) -> bool:
        """Whether the user has a relation of that name, which comes first. Kept in ``shadowed``."""
        if name not in self.shadowed:
            places = self.database.own
            self.shadowed[name] = places is None or any(self.database.is_relation(*place, name) for place in places)
        return self.shadowed[name]


def alias_of(item: exp.Expr, place: int) -> str:
    """The name of an item of FROM; one that no column can be qualified with where it has none."""
    return item.alias_or_name or f"({place})"


def is_cte(item: exp.Table, select: exp.Expr) -> bool:
    """Whether an item of the SELECT's FROM is a CTE."""
    return cte_of(item, select) is not None


def cte_of(item: exp.Table, select: exp.Expr) -> exp.CTE | None:
    """The CTE that an item of the SELECT's FROM names."""
    if item.db or not isinstance(item.this, exp.Identifier):
        return None
    query: exp.Expr | None = select
    while query is not None:
        with_ = query.args.get("with_")
        for cte in _before(with_, select) if isinstance(with_, exp.With) else []:
            if cte.alias.lower() == item.name.lower():
                assert isinstance(cte, exp.CTE)
                return cte
        query = query.parent
    return None


def visible_ctes(select: exp.Expr) -> str:
    """The WITH clause that a SELECT's FROM is bound under: its own, and those of the queries around it."""
    ctes: list[str] = []
    query: exp.Expr | None = select
    while query is not None:
        with_ = query.args.get("with_")
        if isinstance(with_, exp.With):
            ctes = [without_parameters(cte) for cte in _before(with_, select)] + ctes
        query = query.parent
    return f"WITH {', '.join(ctes)} " if ctes else ""


def without_parameters(node: exp.Expr) -> str:
    """SQL with NULL for each parameter: types of columns hardly ever depend on them, and they need no values then."""
    return to_sql(node.copy().transform(lambda one: exp.Null() if isinstance(one, exp.Placeholder) else one))


def _before(with_: exp.With, select: exp.Expr) -> list[exp.Expr]:
    """All CTEs, or those before the one that the SELECT itself stands in."""
    around = {id(node) for node in ancestors(select)}
    inside = next((place for place, cte in enumerate(with_.expressions) if id(cte) in around), None)
    return list(with_.expressions[:inside])


def ancestors(node: exp.Expr | None) -> Iterator[exp.Expr]:
    """The node and everything around it, outwards."""
    while node is not None:
        yield node
        node = node.parent
