"""Applies the rules to a block until none has anything to do."""

from __future__ import annotations

from collections.abc import Callable

from metaql.errors import InternalError
from metaql.logical import Block
from metaql.rules.move_aggregate_to_query_side import move_aggregate_to_query_side

Rule = Callable[[Block], Block | None]

# In the order in which they are tried.
RULES: tuple[Rule, ...] = (move_aggregate_to_query_side,)
# Every rule makes a block smaller, so a long chain of rewrites means that two rules undo each other.
MOST_PASSES = 20


def optimize(block: Block, rules: tuple[Rule, ...] = RULES) -> Block:
    """The block after every rule that applies; InternalError, which names the rule, when one breaks it."""
    for _ in range(MOST_PASSES):
        before = block
        for rule in rules:
            block = _apply(rule, block)
        if block is before:
            return block
    raise InternalError(f"no end to rewriting after {MOST_PASSES} passes of {_names(rules)}")


def _apply(rule: Rule, block: Block) -> Block:
    try:
        result = rule(block)
    except Exception as error:
        raise InternalError(f"the rule {rule.__name__} failed: {error!r}") from error
    if result is None:
        return block
    if (result.keys, result.others, len(result.scores)) != (block.keys, block.others, len(block.scores)):
        raise InternalError(f"the rule {rule.__name__} changed what the query yields")
    return result


def _names(rules: tuple[Rule, ...]) -> str:
    return ", ".join(rule.__name__ for rule in rules)
