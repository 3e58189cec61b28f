"""Applies the rules to a block until none has anything to do."""

from __future__ import annotations

from collections.abc import Callable

from metaql.errors import InternalError
from metaql.logical import Block
from metaql.rules.drop_groups_of_one_row import drop_groups_of_one_row
from metaql.rules.precondition_sums import precondition_sums

Rule = Callable[[Block], Block | None]

# In the order in which they are tried. What is gathered is a matter of cost, and ``choose`` decides it before.
RULES: tuple[Rule, ...] = (
    # After sides were gathered: only then can a group have a single row.
    drop_groups_of_one_row,
    precondition_sums,
)
# Every rule makes a block smaller, or moves something that no rule moves back, so a long chain of rewrites means that
# two rules undo each other.
MOST_PASSES = 20


def optimize(block: Block, rules: tuple[Rule, ...] = RULES) -> tuple[Block, tuple[str, ...]]:
    """The block after every rule that applies, and their names.

    InternalError, which names the rule, when one breaks it.
    """
    applied: list[str] = []
    for _ in range(MOST_PASSES):
        before = block
        for rule in rules:
            after = _apply(rule, block)
            applied += [rule.__name__] if after is not block else []
            block = after
        if block is before:
            return block, tuple(applied)
    raise InternalError(f"no end to rewriting after {MOST_PASSES} passes of {', '.join(r.__name__ for r in rules)}")


def _apply(rule: Rule, block: Block) -> Block:
    try:
        result = rule(block)
    except Exception as error:
        raise InternalError(f"the rule {rule.__name__} failed: {error!r}") from error
    if result is None:
        return block
    require_same_schema(block, result, rule.__name__)
    return result


def require_same_schema(before: Block, after: Block, rule: str) -> None:
    """InternalError, which names the rule, unless both blocks yield the same columns."""
    same_outputs = len(before.outputs) == len(after.outputs)
    same_places = [id(one.place) for one in before.aggregates] == [id(one.place) for one in after.aggregates]
    if not (same_outputs and same_places):
        raise InternalError(f"the rule {rule} changed what the query yields")
