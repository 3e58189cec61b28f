"""Where a GROUP BY has groups of one row only, and where it might not."""

from __future__ import annotations

import pytest

from metaql.logical import AVG, EACH, EACH_COUNT, Block
from metaql.logical_text import block_text
from metaql.rules.drop_groups_of_one_row import drop_groups_of_one_row
from metaql.rules.gather_side import gather_side
from tests.rules.hand_made import aggregate, block, count, pair, steady, term, vector

SCORE = aggregate("avg", pair("t", "v"))
TOTAL = aggregate("sum", pair("t", "v"))
NORM = aggregate("avg", term(vector("t.gradient")))


def gathered(before: Block, *sides: str) -> Block:
    """With these sides gathered."""
    for side in sides:
        before = gather_side(before, frozenset(side.split()))
    return before


DROPPED: dict[str, tuple[Block, str]] = {
    "a sample's score": (
        gathered(block("t v", SCORE, by="t.sample_id"), "v"),
        "⟨t.gradient, gathered_1.avg_1⟩ over t × gathered_1[avg_1 = avg(v.gradient) over v]",
    ),
    "a key more": (
        gathered(block("t v", SCORE, by="t.label, t.sample_id"), "v"),
        "⟨t.gradient, gathered_1.avg_1⟩ over t × gathered_1[avg_1 = avg(v.gradient) over v]",
    ),
    "classes of both sides": (
        gathered(block("t v", SCORE, by="t.label, v.label"), "v", "t"),
        "⟨gathered_1.avg_1, gathered_2.avg_1⟩ over gathered_1[avg_1 = avg(v.gradient) over v by v.label]"
        " × gathered_2[avg_1 = avg(t.gradient) over t by t.label]",
    ),
    "a sample with each class": (
        gathered(block("t v", TOTAL, by="t.sample_id, v.label"), "v"),
        "⟨t.gradient, gathered_1.sum_1⟩ over t × gathered_1[sum_1 = sum(v.gradient) over v by v.label]",
    ),
    "all of both sides, where no row is no problem": (
        gathered(block("t v", SCORE), "v", "t"),
        "⟨gathered_1.avg_1, gathered_2.avg_1⟩ over gathered_1[avg_1 = avg(v.gradient) over v]"
        " × gathered_2[avg_1 = avg(t.gradient) over t]",
    ),
    "counts become the numbers that they were multiplied with": (
        gathered(block("t v", SCORE, count(), count("v.label"), by="t.sample_id"), "v"),
        "⟨t.gradient, gathered_1.avg_1⟩, * · gathered_1.count_2, * weighted gathered_1.count_3 over"
        " t × gathered_1[avg_1 = avg(v.gradient), count_2 = count, count_3 = count over v]",
    ),
    "steady aggregates become their arguments": (
        gathered(block("t v", SCORE, steady("min(t.loss)"), steady("any_value(v.loss)"), by="t.sample_id"), "v"),
        "⟨t.gradient, gathered_1.avg_1⟩, t.loss, gathered_1.steady_2 over"
        " t × gathered_1[avg_1 = avg(v.gradient), steady_2 = ANY_VALUE(v.loss) over v]",
    ),
    "a sum keeps what it was multiplied with": (
        gathered(block("t v w", TOTAL, by="t.sample_id, v.sample_id"), "w"),
        "⟨t.gradient, v.gradient⟩ · gathered_1.count_1 over t × v × gathered_1[count_1 = count over w]",
    ),
    "a gradient": (block("t", NORM, by="t.sample_id"), "t.gradient over t"),
    "of two columns that tell rows apart": (
        block("t", NORM, by="t.split, t.sample_id", unique="sample_id split"),
        "t.gradient over t",
    ),
    "written in other cases": (block("t", NORM, by="t.SAMPLE_ID"), "t.gradient over t"),
    "pairs told apart": (
        block("t v", SCORE, by="t.sample_id, v.sample_id"),
        "⟨t.gradient, v.gradient⟩ over t × v",
    ),
}


@pytest.mark.parametrize("name", DROPPED)
def test_groups_of_one_row(name: str) -> None:
    before, text = DROPPED[name]
    after = drop_groups_of_one_row(before)
    assert after is not None
    assert block_text(after) == text
    assert after.keys is None
    assert all(one.function in (EACH, EACH_COUNT) and one.touched for one in after.aggregates)


KEPT: dict[str, Block] = {
    "no groups": block("t", NORM, by=None),
    "no aggregate": block("t", by="t.sample_id"),
    "not told apart": block("t", NORM, by="t.label"),
    "nothing tells rows apart": block("t", NORM, by="t.sample_id", unique=""),
    "one of two columns": block("t", NORM, by="t.sample_id", unique="sample_id split"),
    "an expression of the column": block("t", NORM, by="t.sample_id + 0"),
    "another relation's column of that name": block("t v", SCORE, by="t.sample_id, t.sample_id"),
    "a column of the query outside": block("t", NORM, by="sample_id"),
    "all rows": block("t", NORM),
    "one of two relations": block("t v", SCORE, by="t.sample_id"),
    "a group of the gathered side is not a key": gathered(block("t v", SCORE, by="t.sample_id, v.label"), "t"),
    "a tie is not a key": gathered(block("t v", SCORE, by="t.sample_id", where="t.label = v.label"), "v"),
    "all rows of one side": gathered(block("t v", SCORE), "v"),
    # Of no rows there is one group, and it says that there are none.
    "one group that may have no row": gathered(block("t v", SCORE, steady("min(t.loss)")), "v", "t"),
    # Whole numbers have an avg that is none, and sums that are wider than they.
    "an average of numbers": block("t", NORM, aggregate("avg", term("t.label")), by="t.sample_id"),
    "a sum of numbers": block("t", NORM, aggregate("sum", term("t.label")), by="t.sample_id"),
    "distinct values": block("t", NORM, steady("count(DISTINCT t.label)"), by="t.sample_id"),
    "a truth": block("t", NORM, steady("bool_and(t.label = 1)"), by="t.sample_id"),
}


@pytest.mark.parametrize("name", KEPT)
def test_groups_that_stay(name: str) -> None:
    assert drop_groups_of_one_row(KEPT[name]) is None


def test_having_is_a_condition_on_groups() -> None:
    before = block("t", NORM, by="t.sample_id")
    having = Block(before.relations, before.conjuncts, before.keys, before.aggregates, has_having=True)
    assert drop_groups_of_one_row(before) is not None
    assert drop_groups_of_one_row(having) is None


def test_weights_of_an_average_over_one_row() -> None:
    """How often the only row counts is nothing to an average, and everything to a sum."""
    for function, weights in ((AVG, 0), ("sum", 1)):
        before = block("t v w", aggregate(function, pair("t", "v")), by="t.sample_id, v.sample_id, w.label")
        after = drop_groups_of_one_row(gathered(before, "w"))
        assert after is not None
        (one,) = after.aggregates
        assert len(one.scales) == weights
        assert not one.weights


def test_the_three_largest_of_one_row() -> None:
    assert drop_groups_of_one_row(block("t", NORM, steady("max(t.label, 3)"), by="t.sample_id")) is None
