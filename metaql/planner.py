"""Plans a text: every SELECT in it, the innermost first, through inline, bind, choose and compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from sqlglot import exp

from metaql.algebra import bare, holds_product, is_product
from metaql.bind import bind
from metaql.catalogue import Catalogue, Described, visible_ctes
from metaql.choose import Choice, choose
from metaql.compile import compile_block, keep_name, name_outputs, scored
from metaql.cost import expected, joined
from metaql.gradients import compile_gradient_aggregates, compile_gradient_arithmetic
from metaql.inline import inline, inline_single_rows
from metaql.logical import Block
from metaql.pairs import compile_pairs
from metaql.parse import parse, to_sql
from metaql.scanned import scan_whole_splits
from metaql.scope import Unsure, name_of
from metaql.stats import Statistics
from metaql.storage.cache import Cache
from metaql.substitute import expand_aliases


@dataclass(frozen=True)
class Planned:
    """A SELECT with products of gradients in it: how it was bound and what was chosen, or why it was not."""

    block: Block | None
    choice: Choice | None
    reason: str | None


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
        self._kept.put(text, _Kept(planned, catalogue.asked, catalogue.viewed), 1)
        return planned


def _holds(kept: _Kept, catalogue: Catalogue) -> bool:
    return all(catalogue.view(name) == text for name, text in kept.viewed.items()) and all(
        catalogue.ask(query) == answer for query, answer in kept.asked.items()
    )


def plan(text: str, catalogue: Catalogue, chosen: Callable[[Block, Statistics], Choice] = choose) -> Plan:
    """The plan of a text; ``chosen`` picks a block's form."""
    statement = parse(text)
    if statement is None:
        return Plan(text)
    tree = statement.tree
    if any(with_.args.get("recursive") for with_ in tree.find_all(exp.With)):
        return Plan(text, statement.prefix)
    _check_patterns(tree, catalogue)
    if isinstance(tree, exp.Select) and holds_product(tree):
        # Before anything in it is planned, which a name would show.
        name_outputs(tree, tree, catalogue)
    planned = Plan(text, statement.prefix, tree)
    changed = [_plan_select(select, catalogue, chosen, planned) for select in _innermost_first(tree)]
    if any(changed):
        _drop_unread_ctes(tree)
        planned.text = statement.prefix + to_sql(tree)
    return planned


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


def _plan_select(
    select: exp.Select, catalogue: Catalogue, chosen: Callable[[Block, Statistics], Choice], plan: Plan
) -> bool:
    """Whether the SELECT was changed."""
    if holds_product(select):
        expand_aliases(select, catalogue)
    single = holds_product(select) and inline_single_rows(select, catalogue)
    if _plan_block(select, catalogue, chosen, plan):
        scan_whole_splits(select, catalogue)
        _unwrap(select)
        return True
    if holds_product(select) and compile_pairs(select, catalogue, _statistics(select, catalogue)):
        return True
    aggregated = compile_gradient_aggregates(select, catalogue)
    combined = compile_gradient_arithmetic(select, catalogue)
    if _expect_rows(select, catalogue):
        scan_whole_splits(select, catalogue)
        return True
    return single or aggregated or combined


def _expect_rows(select: exp.Select, catalogue: Catalogue) -> bool:
    """Tells products with a vector from a sub-query how many there will be; whether there was any."""
    found = [
        node
        for node in select.find_all(exp.Anonymous)
        if name_of(node) == "inner_product" and len(node.expressions) == 2 and node.find_ancestor(exp.Query) is select
        if sum(isinstance(bare(one), exp.Subquery) for one in node.expressions) == 1
    ]
    if not found:
        return False
    try:
        _, block = bind(select, catalogue)
    except Unsure:
        return False
    rows = joined(block, _statistics(select, catalogue))
    for node in found:
        left, right = sorted(node.expressions, key=lambda one: isinstance(bare(one), exp.Subquery))
        keep_name(select, node)
        node.replace(scored(left, right, rows))
    return rows.value is not None


def _plan_block(
    select: exp.Select, catalogue: Catalogue, chosen: Callable[[Block, Statistics], Choice], plan: Plan
) -> bool:
    """Whether the SELECT was changed. If not it is as it was, whatever was tried."""
    before = select.copy()
    concerned = _has_product(select)
    try:
        inline(select, catalogue)
        concerned = concerned or _has_product(select)
        scope, block = bind(select, catalogue)
        statistics = _statistics(select, catalogue)
        choice = chosen(block, statistics)
        algebraic = any(one.is_score or one.is_vector for one in block.aggregates)
        if concerned:
            plan.selects.append(Planned(block, choice, None))
        if algebraic and choice.best.gathered:
            name_outputs(select, before, catalogue)
            form = choice.best.block
            compile_block(scope, form, expected(form, statistics))
            compile_gradient_arithmetic(select, catalogue, columns=False)
            return True
    except Unsure as reason:
        if concerned:
            plan.selects.append(Planned(None, None, str(reason)))
    for key in list(select.args):
        select.set(key, None)
    for key, value in before.args.items():
        select.set(key, value)
    return False


def _has_product(select: exp.Select) -> bool:
    """Whether the SELECT itself multiplies gradients, and not just a query nested in it."""
    return any(is_product(node) and node.find_ancestor(exp.Query) is select for node in select.find_all(exp.Anonymous))


def _unwrap(select: exp.Select) -> None:
    """A scalar sub-query without relations is its expression."""
    outer = select.parent
    known = {key for key, value in select.args.items() if value}
    if known == {"expressions"} and isinstance(outer, exp.Subquery) and _is_scalar(outer):
        around = outer.find_ancestor(exp.Select)
        if around is not None and not outer.alias:
            keep_name(around, outer)
        value: exp.Expr = exp.paren(select.expressions[0].unalias())
        outer.replace(exp.alias_(value, outer.alias, quoted=True) if outer.alias else value)


def _is_scalar(query: exp.Subquery) -> bool:
    return not isinstance(
        query.parent, exp.From | exp.Join | exp.Lateral | exp.CTE | exp.SetOperation | exp.In | exp.Exists
    )


def _statistics(select: exp.Select, catalogue: Catalogue) -> Statistics:
    def exact(item: exp.Expr) -> bool:
        return catalogue.stored(item, select) is not None

    return Statistics(catalogue.database.answer, exact, visible_ctes(select), catalogue.names.counts)


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
