"""Plans one SELECT, of which those inside are planned already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sqlglot import exp

from metaql.algebra import bare, holds_product, is_product
from metaql.bind import bind
from metaql.catalogue import Catalogue
from metaql.choose import Choice
from metaql.compile import compile_block, keep_name, name_outputs, scored
from metaql.cost import expected, joined
from metaql.gradients import compile_gradient_aggregates, compile_gradient_arithmetic
from metaql.inline import inline, inline_single_rows
from metaql.logical import Block
from metaql.pairs import compile_pairs
from metaql.preconditions import precondition_fewer
from metaql.scanned import scan_whole_splits
from metaql.scope import Unsure, name_of
from metaql.stats import Statistics, statistics_of
from metaql.substitute import expand_aliases


@dataclass(frozen=True)
class Planned:
    """A SELECT with products of gradients in it: how it was bound and what was chosen, or why it was not."""

    block: Block | None
    choice: Choice | None
    reason: str | None


Chooser = Callable[[Block, Statistics], Choice]


def plan_select(select: exp.Select, catalogue: Catalogue, chosen: Chooser, notes: list[Planned]) -> bool:
    """Whether the SELECT was changed. What was chosen, if it multiplies gradients, is added to the notes."""
    if holds_product(select):
        expand_aliases(select, catalogue)
    single = holds_product(select) and inline_single_rows(select, catalogue)
    if _plan_block(select, catalogue, chosen, notes):
        scan_whole_splits(select, catalogue)
        _unwrap(select)
        return True
    aggregated = compile_gradient_aggregates(select, catalogue)
    combined = compile_gradient_arithmetic(select, catalogue)
    moved = precondition_fewer(select, catalogue, statistics_of(select, catalogue))
    if holds_product(select) and compile_pairs(select, catalogue, statistics_of(select, catalogue)):
        return True
    if _expect_rows(select, catalogue):
        scan_whole_splits(select, catalogue)
        return True
    return single or aggregated or combined or moved


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
    rows = joined(block, statistics_of(select, catalogue))
    for node in found:
        left, right = sorted(node.expressions, key=lambda one: isinstance(bare(one), exp.Subquery))
        keep_name(select, node)
        node.replace(scored(left, right, rows))
    return rows.value is not None


def _plan_block(select: exp.Select, catalogue: Catalogue, chosen: Chooser, notes: list[Planned]) -> bool:
    """Whether the SELECT was changed. If not it is as it was, whatever was tried."""
    before = select.copy()
    concerned = _has_product(select)
    try:
        inline(select, catalogue)
        concerned = concerned or _has_product(select)
        scope, block = bind(select, catalogue)
        statistics = statistics_of(select, catalogue)
        choice = chosen(block, statistics)
        algebraic = any(one.is_score or one.is_vector for one in block.aggregates)
        if concerned:
            notes.append(Planned(block, choice, None))
        if algebraic and choice.best.gathered:
            name_outputs(select, before, catalogue)
            form = choice.best.block
            compile_block(scope, form, expected(form, statistics))
            compile_gradient_arithmetic(select, catalogue, columns=False)
            return True
    except Unsure as reason:
        if concerned:
            notes.append(Planned(None, None, str(reason)))
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
    single = known == {"expressions"} and len(select.expressions) == 1
    if single and isinstance(outer, exp.Subquery) and _is_scalar(outer):
        around = outer.find_ancestor(exp.Select)
        if around is not None and not outer.alias:
            keep_name(around, outer)
        value: exp.Expr = exp.paren(select.expressions[0].unalias())
        outer.replace(exp.alias_(value, outer.alias, quoted=True) if outer.alias else value)


def _is_scalar(query: exp.Subquery) -> bool:
    """Whether a sub-query stands where an expression does, and not where rows or lists do."""
    around = query.parent
    if isinstance(around, exp.Select):
        return query.arg_key == "expressions"
    if isinstance(around, exp.Func):
        return not isinstance(around, exp.Exists | exp.Array | exp.ArrayAgg)
    return isinstance(around, exp.Alias | exp.Paren | exp.Binary | exp.Neg | exp.Case | exp.If | exp.Where | exp.Having)
