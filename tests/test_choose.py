"""Which side is gathered, for numbers of rows that are known, guessed, or neither."""

from __future__ import annotations

import pytest

from metaql.choose import Alternative, choose
from metaql.logical import EACH, Block, Gather
from metaql.stats import Count, Precision
from tests.rules.hand_made import Numbers, aggregate, block, pair, steady, term, vector

AVERAGE = aggregate("avg", pair("t", "v"))
OUTER_AVERAGE = aggregate("avg", term(vector("gradient"), vector("v.gradient")))
TWO_SCORES = aggregate("sum", pair("t", "v")), aggregate("sum", pair("t", "w"))
TRACIN = block(
    "a b c",
    aggregate("sum", pair("a", "b", "c.rate")),
    by="a.sample_id",
    where="a.checkpoint = b.checkpoint, b.checkpoint = c.checkpoint",
)
SIXTY_FORTY = Numbers(t=60, v=40)


def shown(alternative: Alternative) -> str:
    return " and ".join(" ".join(sorted(side)) for side in alternative.gathered) or "pairs"


# What it is about: the block, what is known, and all forms, the chosen one first.
CHOICES: dict[str, tuple[Block, Numbers, str]] = {
    "P2B": (block("t v", AVERAGE, by="t.sample_id"), SIXTY_FORTY, "v, pairs"),
    "P2B, many more on the query side": (block("t v", AVERAGE, by="t.sample_id"), Numbers(t=6, v=4000), "v, pairs"),
    "B2P": (block("t v", AVERAGE, by="v.sample_id"), SIXTY_FORTY, "t, pairs"),
    # Of equal ones the query side is gathered; to gather the rows as well gains nothing.
    "B2B": (block("t v", AVERAGE), SIXTY_FORTY, "v, t, v and t, pairs"),
    "B2B, more on the query side": (block("t v", AVERAGE), Numbers(t=40, v=60), "v, t, v and t, pairs"),
    "class by class": (
        block("t v", AVERAGE, by="t.label, v.label"),
        SIXTY_FORTY.where(t_label=4, v_label=4),
        "v and t, t, v, pairs",
    ),
    "class by class, as many classes as rows on one side": (
        block("t v", AVERAGE, by="t.label, v.label"),
        SIXTY_FORTY.where(t_label=60, v_label=4),
        "v, pairs",
    ),
    "as many classes as rows on both sides": (
        block("t v", AVERAGE, by="t.sample_id, v.sample_id"),
        SIXTY_FORTY.where(t_sample_id=60, v_sample_id=40),
        "pairs",
    ),
    "a sample with its own class": (
        block("t v", AVERAGE, by="t.sample_id", where="t.label = v.label"),
        SIXTY_FORTY.where(t_label=4, v_label=4, t_sample_id=60),
        "v, pairs",
    ),
    "TracIn": (
        TRACIN,
        Numbers(a=120, b=80, c=2).where(
            a_checkpoint=2, b_checkpoint=2, c_checkpoint=2, b_checkpoint_c_checkpoint=0.5, a_sample_id=60
        ),
        "b c, pairs",
    ),
    "samples that come before others, in few groups": (
        block("t v", AVERAGE, by="t.sample_id", where="t.loss > v.loss"),
        SIXTY_FORTY.where(v_loss=8, t_loss=8, t_sample_id=60),
        "v, pairs",
    ),
    "two query sides": (
        block("t v w", *TWO_SCORES, by="t.sample_id"),
        Numbers(t=60, v=40, w=20),
        "v and w, v, w, pairs",
    ),
    "a correlated sub-query": (block("v", OUTER_AVERAGE), Numbers(v=40), "v, pairs"),
    "a correlated sub-query with a class": (
        block("v", OUTER_AVERAGE, where="v.label = t.label"),
        Numbers(v=40).where(v_label=4),
        "v, pairs",
    ),
    # What nothing is known of is kept as far from pairs as possible.
    "one unknown side": (block("t v", AVERAGE, by="t.sample_id"), Numbers(v=40), "v, pairs"),
    "nothing known": (block("t v", AVERAGE), Numbers(), "v and t, v, t, pairs"),
    "unknown classes": (block("t v", AVERAGE, by="t.label, v.label"), SIXTY_FORTY, "pairs, v and t, v, t"),
    "no query samples": (block("t v", AVERAGE, by="t.sample_id"), Numbers(t=60, v=0), "v, pairs"),
    "no training samples": (block("t v", AVERAGE, by="t.sample_id"), Numbers(t=0, v=40), "v, pairs"),
    "one query sample": (block("t v", AVERAGE, by="t.sample_id"), Numbers(t=60, v=1), "v, pairs"),
    "one pair": (block("t v", AVERAGE, by="t.sample_id"), Numbers(t=1, v=1), "v, pairs"),
    "nothing to multiply": (block("t v", steady("max(t.loss)"), by="t.sample_id"), SIXTY_FORTY, "pairs, v"),
    "one side only": (block("t", aggregate("avg", pair("t", "t")), by="t.label"), SIXTY_FORTY, "pairs"),
    "no aggregate": (block("t v", by=None), SIXTY_FORTY, "pairs"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_forms_by_cost(name: str) -> None:
    form, known, wanted = CHOICES[name]
    assert ", ".join(map(shown, choose(form, known).alternatives)) == wanted


def test_the_chosen_form_costs_least() -> None:
    for form, known, _ in CHOICES.values():
        found = choose(form, known)
        assert found.best is found.alternatives[0]
        assert found.best.cost.order == min(one.cost.order for one in found.alternatives)


def test_what_made_a_form() -> None:
    best = choose(block("t v", AVERAGE, by="t.sample_id"), SIXTY_FORTY).best
    assert [name for name, _ in best.rules] == ["gather_side", "drop_groups_of_one_row"]
    assert best.rules[-1][1] == best.block
    (one,) = best.block.aggregates
    assert one.function == EACH
    pairs = choose(block("t v", AVERAGE, by="t.sample_id"), SIXTY_FORTY).alternatives[-1]
    assert not pairs.rules
    # Groups of one pair are not made plain rows where nothing is gathered: the query stays as it was.
    assert pairs.block.keys


@pytest.mark.parametrize("known, guarded", [(SIXTY_FORTY, False), (Numbers(t=60, v=0), True), (Numbers(t=60), True)])
def test_a_side_that_surely_has_rows_needs_no_guard(known: Numbers, guarded: bool) -> None:
    best = choose(block("t v", AVERAGE, by="t.sample_id"), known).best
    (gather,) = best.block.gathers()
    assert isinstance(gather, Gather)
    assert gather.guarded == guarded


def test_an_estimate_is_not_sure() -> None:
    known = SIXTY_FORTY.where(v_loss_1=0.5)
    best = choose(block("t v", AVERAGE, by="t.sample_id", where="v.loss > 1"), known).best
    (gather,) = best.block.gathers()
    assert gather.guarded
    assert best.cost.gathered == Count(20, Precision.ESTIMATED)


def test_why_a_side_is_not_gathered() -> None:
    mixed = block("t v", aggregate("avg", pair("t", "v", "t.loss + v.loss")), by="t.sample_id")
    found = choose(mixed, SIXTY_FORTY)
    assert list(map(shown, found.alternatives)) == ["pairs"]
    assert found.reasons == ("t.loss + v.loss reads both sides",)
    tied = block("v", OUTER_AVERAGE, where="v.loss < loss")
    assert choose(tied, Numbers(v=40)).reasons == ("v.loss < loss does not say whose columns it reads",)


def test_an_aggregate_of_outer_columns_alone_would_be_the_outer_querys() -> None:
    """If a side that nothing ties became one row, nothing of this query would be left in its aggregate."""
    lonely = block("v", aggregate("avg", term("loss", vector("gradient"), vector("v.gradient"))), by="v.label")
    for one in choose(lonely, Numbers(v=40).where(v_label=4)).alternatives:
        for each in one.block.aggregates:
            assert each.function == EACH or each.reads & one.block.local
