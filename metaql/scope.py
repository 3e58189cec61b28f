"""What the names in one SELECT mean: its relations, whose column a name is, and which expressions are gradients."""

from __future__ import annotations

from sqlglot import exp

from metaql.catalogue import Catalogue, Columns, alias_of, ancestors
from metaql.logical import OUTER
from metaql.parse import to_sql
from metaql.udfs.aggregates import MEAN
from metaql.udfs.aggregates import SUM as TOTAL
from metaql.udfs.references import GRADIENT

# Evaluated once for each row or at a moment of their own, so that fewer rows would give other values.
VOLATILE = frozenset({"random", "rand", "uuid", "gen_random_uuid", "uuidv4", "uuidv7", "nextval", "setseed"})
_KNOWN = frozenset(
    [
        "expressions",
        "from_",
        "joins",
        "where",
        "group",
        "having",
        "order",
        "limit",
        "offset",
        "with_",
        "distinct",
        "qualify",
    ]
)
VECTOR_FUNCTIONS = frozenset({"layers", "gradient", "precondition", MEAN, TOTAL})


class Unsure(Exception):  # noqa: N818 - never leaves the front end
    """The SELECT has something that is not understood well enough to be moved; the text says what."""


class Scope:
    """A SELECT's relations and names. Unsure when they are joined by more than conditions, or can't be bound.

    Without ``joins`` it does not matter how they are joined, and ``items`` is empty.
    """

    def __init__(self, select: exp.Select, catalogue: Catalogue, joins: bool = True) -> None:
        self.select, self._catalogue = select, catalogue
        self.items = items_of(select) if joins else []
        columns = catalogue.columns(select)
        if columns is None:
            raise Unsure("its relations can't be bound one by one")
        self.columns: Columns = columns
        self.aliases = {item.alias.lower(): item.this for item in select.expressions if isinstance(item, exp.Alias)}

    @property
    def all_columns(self) -> set[str]:
        """Every column's name, in lower case."""
        return {name for columns in self.columns.values() for name in columns}

    def owners(self, column: exp.Column) -> set[str]:
        """The relations that a name may belong to; none for a name of another query, outside or further inside."""
        first = column.parts[0].name.lower()
        if len(column.parts) > 1:
            named = {alias for alias in self.columns if alias.lower() == first}
            if named:
                return named
        return {alias for alias, columns in self.columns.items() if first in columns}

    def reads(self, node: exp.Expr) -> frozenset[str]:
        """The relations that an expression reads; one too many rather than one too few."""
        found: set[str] = set()
        for column in node.find_all(exp.Column):
            found |= self._reads(column, node)
        return frozenset(found)

    def _reads(self, column: exp.Column, root: exp.Expr) -> set[str]:
        owners = self.owners(column)
        if self._belongs_inside(column, root):
            return set()
        if len(column.parts) == 1 and len(owners) > 1:
            raise Unsure(f"{column.sql('duckdb')} could be of several relations")
        aliased = self.aliases.get(column.name.lower()) if len(column.parts) == 1 and not owners else None
        if aliased is not None and not any(one is column for one in aliased.walk()):
            return set(self.reads(aliased))
        # A relation's name alone is a row of it.
        return owners or {alias for alias in self.columns if alias.lower() == column.sql("duckdb").lower()} or {OUTER}

    def is_alias(self, column: exp.Expr) -> bool:
        """Whether a name is one of the select list's own: in ORDER BY these come first, elsewhere columns do."""
        if not isinstance(column, exp.Column) or len(column.parts) > 1:
            return False
        name = column.name.lower()
        if any(isinstance(one, exp.Order) and one.parent is self.select for one in ancestors(column)):
            return name in {item.alias_or_name.lower() for item in self.select.expressions}
        return name in self.aliases and not self.owners(column)

    def _belongs_inside(self, column: exp.Column, root: exp.Expr) -> bool:
        """Whether a name within ``root`` is one of a query nested in it."""
        for query in ancestors(column):
            if query is self.select or query is root.parent:
                return False
            if isinstance(query, exp.Select) and query is not root:
                columns = self._catalogue.columns(query)
                if columns is None:
                    raise Unsure("a sub-query's relations can't be bound one by one")
                first = column.parts[0].name.lower()
                if any(alias.lower() == first for alias in columns) and len(column.parts) > 1:
                    return True
                if any(first in names for names in columns.values()):
                    return True
        return False

    def is_vector(self, node: exp.Expr) -> bool:
        """Whether an expression is a gradient, as far as its form tells."""
        if isinstance(node, exp.Paren):
            return self.is_vector(node.this)
        if isinstance(node, exp.Column):
            return self._column_is_vector(node)
        if isinstance(node, exp.Anonymous):
            return node.name.lower() in VECTOR_FUNCTIONS
        if isinstance(node, exp.Subquery):
            first = node.this.expressions[0] if isinstance(node.this, exp.Select) and node.this.expressions else None
            return isinstance(first, exp.Expr) and self.is_vector(first.unalias())
        if isinstance(node, exp.Avg | exp.Sum | exp.Neg):
            return self.is_vector(node.this)
        if isinstance(node, exp.Case):
            return any(self.is_vector(one.args["true"]) for one in node.args["ifs"])
        if isinstance(node, exp.Add | exp.Sub | exp.Mul):
            return self.is_vector(node.left) or self.is_vector(node.right)
        return isinstance(node, exp.Div | exp.Coalesce) and self.is_vector(node.this)

    def _column_is_vector(self, node: exp.Column) -> bool:
        owners = self.owners(node)
        qualified = len(node.parts) == 1 or node.parts[0].name.lower() in {alias.lower() for alias in owners}
        return qualified and any(self.columns[alias].get(node.name.lower()) == GRADIENT for alias in owners)

    def types(self, column: exp.Column) -> set[str]:
        """The types that a name may have."""
        return {self.columns[alias].get(column.name.lower(), "") for alias in self.owners(column)}

    def canonical(self, node: exp.Expr) -> str:
        """The same text for the same expression, whether or not its columns say whose they are."""
        if isinstance(node, exp.Column):
            # By far the most common, and the writing of it is the most of the time.
            owners = self.owners(node) if len(node.parts) == 1 else set()
            parts = [*(owners if len(owners) == 1 else ()), *(part.name for part in node.parts)]
            return ".".join(parts).lower()
        return to_sql(self.qualified(node), comments=False).lower()

    def qualified(self, node: exp.Expr) -> exp.Expr:
        """A copy whose columns say whose they are, if that has a name."""

        def qualify(one: exp.Expr) -> exp.Expr:
            if isinstance(one, exp.Column) and len(one.parts) == 1 and one.find_ancestor(exp.Query) is None:
                owners = self.owners(one)
                if len(owners) == 1 and not next(iter(owners)).startswith("("):
                    return exp.Column(this=one.this.copy(), table=exp.to_identifier(next(iter(owners))))
            return one

        return node.copy().transform(qualify, copy=False)


def check_shape(select: exp.Select) -> None:
    """Unsure unless it is a group over a join: DISTINCT ON, samples and grouping sets multiply rows in other ways."""
    strange = [key for key, value in select.args.items() if value and key not in _KNOWN]
    if strange:
        raise Unsure(f"the SELECT has {strange[0].strip('_').upper()}")
    distinct = select.args.get("distinct")
    if distinct is not None and distinct.args.get("on"):
        raise Unsure("DISTINCT ON takes one row of several")
    group = select.args.get("group")
    if group and any(value and key not in ("expressions", "all") for key, value in group.args.items()):
        raise Unsure("GROUP BY has grouping sets")
    if group and group.find(exp.Rollup, exp.Cube, exp.GroupingSets):
        raise Unsure("GROUP BY has grouping sets")
    if any(item.is_star or item.find(exp.Columns) for item in select.expressions):
        raise Unsure("the select list has a *")
    # To walk through a tree takes longer than all that is asked of its nodes.
    nodes = list(select.walk())
    if any(name_of(node) in VOLATILE for node in nodes):
        raise Unsure("a random function gives other values for other rows")
    if any(isinstance(node, exp.TableSample) for node in nodes):
        raise Unsure("a relation is sampled")
    if any(isinstance(node, exp.Lambda) for node in nodes):
        raise Unsure("a lambda can hold no sub-query")


def items_of(select: exp.Select) -> list[exp.Expr]:
    """The items of FROM; Unsure unless they are joined by nothing but conditions."""
    source = select.args.get("from_")
    if source is None:
        return []
    items = [source.this]
    for join in select.args.get("joins") or ():
        check_join(join)
        if join.args.get("using"):
            raise Unsure("USING merges columns")
        items.append(join.this)
    if not all(isinstance(item, exp.Table | exp.Subquery) for item in items):
        raise Unsure("FROM has more than relations and sub-queries")
    aliases = {alias_of(item, n).lower() for n, item in enumerate(items)}
    if len(aliases) < len(items):
        raise Unsure("two relations have the same name")
    if any(item.args.get(key) for item in items for key in ("joins", "laterals", "pivots", "sample")):
        raise Unsure("a relation of FROM is pivoted or sampled")
    if select.args.get("laterals"):
        raise Unsure("FROM has a LATERAL item")
    return items


def check_join(join: exp.Join) -> None:
    """Unsure unless the join does nothing but combine rows under a condition."""
    side = " ".join(join.args.get(key) or "" for key in ("method", "side", "kind")).strip().upper()
    if side not in ("", "INNER", "CROSS"):
        raise Unsure(f"{side} JOIN keeps or drops rows by their partners")
    if any(join.args.get(key) for key in ("global", "hint", "match_condition")):
        raise Unsure("a join of an unknown kind")


def name_of(node: exp.Expr) -> str:
    """A function's name in lower case; empty for anything else."""
    if isinstance(node, exp.Anonymous):
        return node.name.lower()
    return node.sql_name().lower() if isinstance(node, exp.Func) else ""
