"""The driver distrusts rules: whatever one does wrong, the error names it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from metaql import optimizer
from metaql.errors import InternalError
from metaql.logical import Block
from metaql.optimizer import MOST_PASSES, RULES, optimize, require_same_schema
from metaql.rules.drop_groups_of_one_row import drop_groups_of_one_row
from metaql.rules.gather_side import gather_side
from tests.rules.hand_made import aggregate, block, pair, scalar, term, vector

BLOCK = block("t", aggregate("avg", term(vector("t.gradient"))), by="t.sample_id", outputs="t.loss")


def test_the_names_of_the_rules_that_applied() -> None:
    assert [rule.__name__ for rule in RULES] == ["drop_groups_of_one_row", "precondition_sums"]
    found, applied = optimize(BLOCK)
    assert (found.keys, applied) == (None, ("drop_groups_of_one_row",))
    assert optimize(found) == (found, ())
    assert optimize(BLOCK, ()) == (BLOCK, ())


def test_rules_in_their_order_until_none_has_anything_to_do() -> None:
    def first(one: Block) -> Block | None:
        return replace(one, conjuncts=one.conjuncts[:-1]) if one.conjuncts else None

    def second(one: Block) -> Block | None:
        return replace(one, keys=()) if one.keys and not one.conjuncts else None

    before = block("t", by="t.sample_id", where="t.loss > 1, t.loss > 2")
    found, applied = optimize(before, (second, first))
    assert (found.conjuncts, found.keys) == ((), ())
    assert applied == ("first", "first", "second")


def test_a_rule_that_fails() -> None:
    def divide_by_nothing(one: Block) -> Block | None:
        return replace(one, keys=one.keys[: 1 // len(one.conjuncts)] if one.keys else None)

    with pytest.raises(InternalError, match=r"the rule divide_by_nothing failed: ZeroDivisionError") as caught:
        optimize(BLOCK, (divide_by_nothing,))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def without_outputs(one: Block) -> Block | None:
    return replace(one, outputs=())


def without_aggregates(one: Block) -> Block | None:
    return replace(one, aggregates=())


def with_another_aggregate(one: Block) -> Block | None:
    return replace(one, aggregates=(aggregate("avg", term(vector("t.gradient"))),))


@pytest.mark.parametrize("rule", [without_outputs, without_aggregates, with_another_aggregate])
def test_a_rule_that_changes_what_the_query_yields(rule: optimizer.Rule) -> None:
    with pytest.raises(InternalError, match=rf"the rule {rule.__name__} changed what the query yields"):
        optimize(BLOCK, (drop_groups_of_one_row, rule))


def test_aggregates_in_another_order_are_another_result() -> None:
    two = block("t", aggregate("avg", term("t.loss")), aggregate("sum", term("t.loss")))
    with pytest.raises(InternalError, match="the rule turned_round changed"):
        require_same_schema(two, replace(two, aggregates=two.aggregates[::-1]), "turned_round")


def test_what_is_gathered_yields_the_same() -> None:
    before = block("t v", aggregate("avg", pair("t", "v")), by="t.sample_id", outputs="t.loss")
    require_same_schema(before, gather_side(before, frozenset("v")), "gather_side")


def test_rules_that_undo_each_other() -> None:
    passes = []

    def add(one: Block) -> Block | None:
        passes.append(one)
        return replace(one, conjuncts=(scalar("t.loss > 1"),)) if not one.conjuncts else None

    def drop(one: Block) -> Block | None:
        return replace(one, conjuncts=()) if one.conjuncts else None

    with pytest.raises(InternalError, match=rf"no end to rewriting after {MOST_PASSES} passes of add, drop"):
        optimize(BLOCK, (add, drop))
    assert len(passes) == MOST_PASSES
