"""What forms of a block cost, in products of two vectors."""

from __future__ import annotations

import pytest

from metaql.cost import GROUP, OUTER_ROWS, PAIRS, Cost, cost, expected, joined
from metaql.logical import Block
from metaql.rules.drop_groups_of_one_row import drop_groups_of_one_row
from metaql.rules.gather_side import gather_side
from metaql.stats import UNKNOWN, Count, Precision
from tests.rules.hand_made import Numbers, aggregate, block, count, pair, steady, term, vector

EXACT, ESTIMATED = Precision.EXACT, Precision.ESTIMATED
AVERAGE = aggregate("avg", pair("t", "v"))
SIXTY_FORTY = Numbers(t=60, v=40)
CLASSES = SIXTY_FORTY.where(t_label=4, v_label=5)


def gathered(before: Block, *sides: str) -> Block:
    for side in sides:
        before = gather_side(before, frozenset(side.split()))
    return before


def exactly(value: float) -> Count:
    return Count(value, EXACT)


def about(value: float) -> Count:
    return Count(value, ESTIMATED)


# What it is about: the block, what is known, and its cost.
COSTS: dict[str, tuple[Block, Numbers, Cost]] = {
    "pair by pair": (
        block("t v", AVERAGE, by="t.sample_id"),
        SIXTY_FORTY,
        Cost(exactly(0), exactly(0), exactly(2400), 0),
    ),
    "the query side is added up once, and multiplied with every sample": (
        gathered(block("t v", AVERAGE, by="t.sample_id"), "v"),
        SIXTY_FORTY,
        Cost(exactly(40), exactly(0), exactly(60), 1),
    ),
    "both sides": (
        gathered(block("t v", AVERAGE), "v", "t"),
        SIXTY_FORTY,
        Cost(exactly(100), exactly(0), exactly(1), 2),
    ),
    "groups are vectors of their own": (
        gathered(block("t v", AVERAGE, by="t.label, v.label"), "v"),
        CLASSES,
        Cost(exactly(40), about(5), about(300), 1),
    ),
    "groups of both sides": (
        gathered(block("t v", AVERAGE, by="t.label, v.label"), "v", "t"),
        CLASSES,
        Cost(exactly(100), about(9), about(20), 2),
    ),
    "an equality between rows": (
        block("t v", AVERAGE, where="t.label = v.label"),
        CLASSES,
        Cost(exactly(0), exactly(0), about(480), 0),
    ),
    "an equality between rows and groups": (
        gathered(block("t v", AVERAGE, where="t.label = v.label"), "v"),
        CLASSES,
        Cost(exactly(40), about(5), about(60), 1),
    ),
    "other conditions drop nothing": (
        block("t v", AVERAGE, where="t.loss > v.loss"),
        SIXTY_FORTY,
        Cost(exactly(0), exactly(0), exactly(2400), 0),
    ),
    "a condition on one side": (
        block("t v", AVERAGE, where="t.loss > 1"),
        SIXTY_FORTY.where(t_loss_1=0.5),
        Cost(exactly(0), exactly(0), about(1200), 0),
    ),
    "two scores": (
        block("t v", AVERAGE, aggregate("sum", pair("t", "v")), count(), steady("min(t.loss)")),
        SIXTY_FORTY,
        Cost(exactly(0), exactly(0), exactly(4800), 0),
    ),
    "nothing of gradients": (
        block("t v", count(), steady("min(t.loss)")),
        SIXTY_FORTY,
        Cost(exactly(0), exactly(0), exactly(0), 0),
    ),
    "an average of gradients": (
        block("t", aggregate("avg", term(vector("t.gradient")))),
        SIXTY_FORTY,
        Cost(exactly(0), exactly(0), exactly(60), 0),
    ),
    "once for each row of the query outside, of which nobody knows how many there are": (
        block("v", aggregate("avg", term(vector("gradient"), vector("v.gradient")))),
        SIXTY_FORTY,
        Cost(exactly(0), exactly(0), about(40 * OUTER_ROWS), 0),
    ),
    "an unknown relation": (
        gathered(block("t v", AVERAGE, by="t.sample_id"), "v"),
        Numbers(v=40),
        Cost(exactly(40), exactly(0), UNKNOWN, 1),
    ),
    "unknown groups": (
        gathered(block("t v", AVERAGE, by="v.label"), "v"),
        SIXTY_FORTY,
        Cost(exactly(40), UNKNOWN, UNKNOWN, 1),
    ),
    "a side without rows takes as long to find out about as one of a single row": (
        gathered(block("t v", AVERAGE, by="t.sample_id"), "v"),
        Numbers(t=60, v=0),
        Cost(exactly(0), exactly(0), exactly(60), 1),
    ),
}


@pytest.mark.parametrize("name", COSTS)
def test_costs(name: str) -> None:
    form, known, wanted = COSTS[name]
    assert cost(form, known) == wanted


def test_the_total_and_what_it_is_sorted_by() -> None:
    assert Cost(exactly(100), about(9), about(20), 2).total == about(100 + 9 * GROUP + 20)
    assert Cost(exactly(100), exactly(0), exactly(1), 2).order == (False, 101)
    # Pairs are joined before they are multiplied.
    assert Cost(exactly(0), exactly(0), exactly(50), 0).order == (False, 50 * PAIRS)
    unknown = [Cost(UNKNOWN, exactly(0), exactly(1), sides) for sides in (0, 1, 2)]
    assert all(one.total == UNKNOWN for one in unknown)
    known = Cost(exactly(10**12), exactly(0), exactly(0), 0)
    assert sorted([*unknown, known], key=lambda one: one.order) == [known, *unknown[::-1]]


def test_of_two_equalities_each_divides() -> None:
    three = block("t v w", AVERAGE, where="t.label = v.label, v.place = w.place")
    known = CLASSES.where(w=10, v_place=8)
    assert joined(three, known) == about(60 * 40 * 10 / 5 / 8)
    # Where no side's values are known, an equality is no condition.
    assert joined(three, SIXTY_FORTY.where(w=10)) == about(60 * 40 * 10)


def test_how_many_products_each_gathered_vector_is_in() -> None:
    whole = gathered(block("t v", AVERAGE, by="t.sample_id"), "v")
    assert expected(whole, SIXTY_FORTY) == exactly(60)
    by_class = gathered(block("t v", AVERAGE, by="t.sample_id", where="t.label = v.label"), "v")
    assert expected(by_class, CLASSES) == about(12)
    dropped = drop_groups_of_one_row(whole)
    assert dropped is not None
    assert expected(dropped, SIXTY_FORTY) == exactly(60)
    outside = gathered(block("v", aggregate("avg", term(vector("gradient"), vector("v.gradient")))), "v")
    assert expected(outside, SIXTY_FORTY) == UNKNOWN
