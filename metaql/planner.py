"""Plans a text: every SELECT in it, the innermost first, through bind, rules and compile."""

from __future__ import annotations

from dataclasses import dataclass

from sqlglot import exp

from metaql.bind import bind
from metaql.catalogue import Answer, Catalogue
from metaql.compile import compile_block, compile_gradient_aggregates
from metaql.optimizer import RULES, Rule, optimize
from metaql.parse import number_parameters, parse, to_sql
from metaql.storage.cache import Cache


@dataclass(frozen=True)
class _Kept:
    """A plan, and what DuckDB had answered when it was made."""

    planned: str
    asked: dict[str, Answer]


class Plans:
    """Plans of earlier texts; each holds as long as DuckDB's answers to what it asked are what they were."""

    def __init__(self, count: int = 256) -> None:
        self._kept: Cache[str, _Kept] = Cache(count)

    def plan(self, text: str, catalogue: Catalogue) -> str:
        """As the function ``plan``."""
        kept = self._kept.get(text)
        if kept is not None and all(catalogue.ask(query) == answer for query, answer in kept.asked.items()):
            return kept.planned
        planned = plan(text, catalogue)
        self._kept.put(text, _Kept(planned, catalogue.asked), 1)
        return planned


def plan(text: str, catalogue: Catalogue, rules: tuple[Rule, ...] = RULES) -> str:
    """The text that DuckDB should run. Without anything to rewrite it is the same text, letter by letter."""
    statement = parse(text)
    if statement is None:
        return text
    tree = statement.tree
    if any(with_.args.get("recursive") for with_ in tree.find_all(exp.With)):
        return text
    _check_patterns(tree, catalogue)
    number_parameters(tree)
    changed = [_plan_select(select, catalogue, rules) for select in _innermost_first(tree)]
    return statement.prefix + to_sql(tree) if any(changed) else text


def _check_patterns(tree: exp.Expr, catalogue: Catalogue) -> None:
    """Layer patterns that stand in the text are looked up now; an error in a function would come as DuckDB's own."""
    for call in tree.find_all(exp.Anonymous):
        if call.name.lower() in ("layers", "restore") and len(call.expressions) == 2:
            pattern = call.expressions[1]
            if isinstance(pattern, exp.Literal) and pattern.is_string:
                catalogue.check_pattern(pattern.name)


def _plan_select(select: exp.Select, catalogue: Catalogue, rules: tuple[Rule, ...]) -> bool:
    moved = False
    bound = bind(select, catalogue)
    if bound is not None:
        block = optimize(bound.block, rules)
        if block is not bound.block:
            compile_block(select, bound, block)
            moved = True
    return compile_gradient_aggregates(select, catalogue) or moved


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
