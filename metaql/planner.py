"""Plans a text: every SELECT in it, the innermost first, through inline, bind, choose and compile."""

from __future__ import annotations

from dataclasses import dataclass, field

from sqlglot import exp

from metaql.algebra import holds_product
from metaql.catalogue import Catalogue, Described
from metaql.choose import choose
from metaql.compile import name_outputs
from metaql.parse import parse, to_sql
from metaql.select_planner import Chooser, Planned, plan_select
from metaql.storage.cache import Cache
from metaql.udfs.precondition import MACRO as PRECONDITION
from metaql.udfs.precondition import require_method


@dataclass
class Plan:
    """The text that DuckDB should run, and how it came about.

    Without anything to rewrite it is the same text, letter by letter.
    """

    text: str
    prefix: str = ""
    tree: exp.Expr | None = None
    selects: list[Planned] = field(default_factory=list)
    warned: bool = False


@dataclass(frozen=True)
class _Kept:
    """A plan, and what DuckDB had answered when it was made."""

    plan: Plan
    asked: dict[str, Described]
    viewed: dict[str, str | None]
    shadowed: dict[str, bool]


class Plans:
    """Plans of earlier texts; each holds as long as DuckDB's answers to what it asked are what they were."""

    def __init__(self, count: int = 256) -> None:
        self._kept: Cache[str, _Kept] = Cache(count)

    def plan(self, text: str, catalogue: Catalogue) -> Plan:
        """As the function ``plan``."""
        kept = self._kept.get(text)
        if kept is not None and _holds(kept, catalogue):
            return kept.plan
        planned = plan(text, catalogue)
        self._kept.put(text, _Kept(planned, catalogue.asked, catalogue.viewed, catalogue.shadowed), 1)
        return planned


def _holds(kept: _Kept, catalogue: Catalogue) -> bool:
    return (
        all(catalogue.is_shadowed(name) == answer for name, answer in kept.shadowed.items())
        and all(catalogue.view(name) == text for name, text in kept.viewed.items())
        and all(catalogue.ask(query) == answer for query, answer in kept.asked.items())
    )


def plan(text: str, catalogue: Catalogue, chosen: Chooser = choose) -> Plan:
    """The plan of a text; ``chosen`` picks a block's form."""
    statement = parse(text)
    if statement is None:
        return Plan(text)
    tree = statement.tree
    withs = list(tree.find_all(exp.With))
    if any(with_.args.get("recursive") for with_ in withs):
        return Plan(text, statement.prefix)
    _check_patterns(tree, catalogue)
    if isinstance(tree, exp.Select) and holds_product(tree):
        # Before anything in it is planned, which a name would show.
        own = text[len(statement.prefix) :]
        # The user's own words, unless DuckDB would ask what its parameters are.
        name_outputs(tree, tree if tree.find(exp.Placeholder, exp.Parameter) else own, catalogue)
    planned = Plan(text, statement.prefix, tree)
    changed = [plan_select(select, catalogue, chosen, planned.selects) for select in _innermost_first(tree)]
    if any(changed):
        if withs:
            _drop_unread_ctes(tree)
        _name_columns(tree)
        planned.text = statement.prefix + to_sql(tree)
    return planned


def _name_columns(tree: exp.Expr) -> None:
    """Columns without a name keep the one that DuckDB gave them, whatever has become of their text."""
    for item in list(tree.expressions) if isinstance(tree, exp.Select) else ():
        if "named" in item.meta and not isinstance(item, exp.Alias):
            item.replace(exp.alias_(item.copy(), item.meta["text"], quoted=True))


def _drop_unread_ctes(tree: exp.Expr) -> None:
    """CTEs that were taken in where they were read."""
    for with_ in list(tree.find_all(exp.With)):
        query = with_.parent
        assert query is not None
        for cte in reversed(list(with_.expressions)):
            read = any(table.name.lower() == cte.alias.lower() and not table.db for table in query.find_all(exp.Table))
            if not read and isinstance(cte.this, exp.Query):
                cte.pop()
        if not with_.expressions:
            with_.pop()


def _check_patterns(tree: exp.Expr, catalogue: Catalogue) -> None:
    """Layer patterns that stand in the text are looked up now; an error in a function would come as DuckDB's own."""
    for call in tree.find_all(exp.Anonymous):
        if call.name.lower() in ("layers", "restore") and len(call.expressions) == 2:
            pattern = call.expressions[1]
            if isinstance(pattern, exp.Literal) and pattern.is_string:
                catalogue.names.check_pattern(pattern.name)
        if call.name.lower() == PRECONDITION and len(call.expressions) > 1:
            method = call.expressions[1]
            if isinstance(method, exp.Literal) and method.is_string:
                require_method(method.name)


def _innermost_first(tree: exp.Expr) -> list[exp.Select]:
    """Every SELECT after those inside it, and after the CTEs before it: they are bound as they were compiled."""
    found: list[exp.Select] = []

    def visit(node: exp.Expr) -> None:
        with_ = node.args.get("with_")
        for child in [with_] if with_ is not None else []:
            visit(child)
        for child in node.iter_expressions():
            if child is not with_:
                visit(child)
        if isinstance(node, exp.Select):
            found.append(node)

    visit(tree)
    return found
