"""Where a side is gathered, and what becomes of everything else; where that would change the answer."""

from __future__ import annotations

import pytest
from sqlglot import exp

from metaql.logical import OUTER, Block, Gather, Term
from metaql.logical_text import block_text
from metaql.parse import to_sql
from metaql.rules.gather_side import gather_side
from metaql.scope import Unsure
from tests.rules.hand_made import aggregate, block, count, pair, scalar, steady, term, vector

AVERAGE = aggregate("avg", pair("t", "v"))
TOTAL = aggregate("sum", pair("t", "v"))


def restricted(left: str, right: str, *, on_left: str = "", on_right: str = "") -> Term:
    """A product of gradients with a pattern at one of them."""
    left_patterns, right_patterns = ([one] if one else [] for one in (on_left, on_right))
    return term(vector(f"{left}.gradient", *left_patterns), vector(f"{right}.gradient", *right_patterns))


# What it is about: the block, the side, and what becomes of it.
GATHERED: dict[str, tuple[Block, str, str]] = {
    "P2B": (
        block("t v", AVERAGE, by="t.sample_id"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩) over t × gathered_1[avg_1 = avg(v.gradient) over v] by t.sample_id",
    ),
    "B2P": (
        block("t v", AVERAGE, by="v.sample_id"),
        "t",
        "avg(⟨v.gradient, gathered_1.avg_1⟩) over v × gathered_1[avg_1 = avg(t.gradient) over t] by v.sample_id",
    ),
    "B2B": (
        block("t v", AVERAGE),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩) over t × gathered_1[avg_1 = avg(v.gradient) over v]",
    ),
    "grouped by its own key, every group counts as many pairs": (
        block("t v", AVERAGE, by="t.label, v.label"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩) over"
        " t × gathered_1[avg_1 = avg(v.gradient) over v by v.label] by t.label, gathered_1.key_1",
    ),
    "its own conditions go inside": (
        block("t v", AVERAGE, by="t.sample_id", where="v.loss > 1, t.loss > 2"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩) over"
        " t × gathered_1[avg_1 = avg(v.gradient) over v where v.loss > 1] where t.loss > 2 by t.sample_id",
    ),
    "weights go with their own vectors": (
        block("t v", aggregate("sum", pair("t", "v", "t.loss", "v.loss", "2")), by="t.sample_id"),
        "v",
        "sum((t.loss)·(2)·⟨t.gradient, gathered_1.sum_1⟩) over"
        " t × gathered_1[sum_1 = sum((v.loss)·v.gradient) over v] by t.sample_id",
    ),
    "a condition on both sides: groups by what it reads, weighted by their rows": (
        block("t v", AVERAGE, by="t.sample_id", where="t.label = v.label"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩) weighted gathered_1.count_2 over"
        " t × gathered_1[avg_1 = avg(v.gradient), count_2 = count over v by v.label]"
        " where t.label = gathered_1.key_1 by t.sample_id",
    ),
    "sums of sums need no weights": (
        block("t v", TOTAL, by="t.sample_id", where="t.label < v.label + v.loss"),
        "v",
        "sum(⟨t.gradient, gathered_1.sum_1⟩) over"
        " t × gathered_1[sum_1 = sum(v.gradient) over v by v.label, v.loss]"
        " where t.label < gathered_1.key_1 + gathered_1.key_2 by t.sample_id",
    ),
    "a key of both sides ties them": (
        block("t v", TOTAL, by="t.label - v.label"),
        "v",
        "sum(⟨t.gradient, gathered_1.sum_1⟩) over"
        " t × gathered_1[sum_1 = sum(v.gradient) over v by v.label] by t.label - gathered_1.key_1",
    ),
    "several terms, one column for equal ones": (
        block("t v", aggregate("sum", pair("t", "v"), pair("t", "v", "t.loss")), TOTAL, by="t.sample_id"),
        "v",
        "sum(⟨t.gradient, gathered_1.sum_1⟩ + (t.loss)·⟨t.gradient, gathered_1.sum_1⟩),"
        " sum(⟨t.gradient, gathered_1.sum_1⟩) over t × gathered_1[sum_1 = sum(v.gradient) over v] by t.sample_id",
    ),
    "a sum that reads nothing of it is multiplied with its rows": (
        block("t v", AVERAGE, aggregate("sum", term("t.loss")), by="t.sample_id"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩), sum((t.loss)) · gathered_1.count_2 over"
        " t × gathered_1[avg_1 = avg(v.gradient), count_2 = count over v] by t.sample_id",
    ),
    "an average that reads nothing of it is the same": (
        block("t v", AVERAGE, aggregate("avg", term("t.loss")), by="t.sample_id"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩), avg((t.loss)) over"
        " t × gathered_1[avg_1 = avg(v.gradient) over v] by t.sample_id",
    ),
    "a sum and an average over it alone": (
        block("t v", aggregate("sum", term("v.loss")), aggregate("avg", term("v.loss")), by="t.sample_id"),
        "v",
        "sum((gathered_1.sum_1)), avg((gathered_1.avg_2)) over"
        " t × gathered_1[sum_1 = sum((v.loss)), avg_2 = avg((v.loss)) over v] by t.sample_id",
    ),
    "a sum of terms, one without anything of it: rows where nothing of it is NULL": (
        block("t v", aggregate("sum", pair("t", "v"), term("t.loss")), by="t.sample_id"),
        "v",
        "sum(⟨t.gradient, gathered_1.sum_1⟩ + (t.loss)·(gathered_1.count_2)) over"
        " t × gathered_1[sum_1 = sum(v.gradient), count_2 = count over v] by t.sample_id",
    ),
    "counts": (
        block("t v", AVERAGE, count(), count("v.label"), count("t.label"), by="t.sample_id"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩), count(*) · gathered_1.count_2, count(*) weighted gathered_1.count_3,"
        " count((t.label)) · gathered_1.count_2 over"
        " t × gathered_1[avg_1 = avg(v.gradient), count_2 = count, count_3 = count over v] by t.sample_id",
    ),
    "steady aggregates of either side": (
        block("t v", AVERAGE, steady("min(v.loss)"), steady("max(t.loss)"), by="t.sample_id"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩), MIN(gathered_1.steady_2), MAX(t.loss) over"
        " t × gathered_1[avg_1 = avg(v.gradient), steady_2 = MIN(v.loss) over v] by t.sample_id",
    ),
    "distinct values, counted once": (
        block("t v", AVERAGE, steady("count(DISTINCT v.label)"), by="t.sample_id"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩), ANY_VALUE(gathered_1.steady_2) over"
        " t × gathered_1[avg_1 = avg(v.gradient), steady_2 = COUNT(DISTINCT v.label) over v] by t.sample_id",
    ),
    "a pattern goes to the gathered side, wherever it stood": (
        block("t v", aggregate("avg", restricted("t", "v", on_left="'fc1'")), by="t.sample_id"),
        "v",
        "avg(⟨t.gradient, gathered_1.avg_1⟩) over t × gathered_1[avg_1 = avg(v.gradient|'fc1') over v] by t.sample_id",
    ),
    "a pattern of the other side's stays there": (
        block("t v", aggregate("avg", restricted("t", "v", on_right="t.part")), by="t.sample_id"),
        "v",
        "avg(⟨t.gradient|t.part, gathered_1.avg_1⟩) over t × gathered_1[avg_1 = avg(v.gradient) over v] by t.sample_id",
    ),
    "a product within the side is a number there": (
        block("t v w", aggregate("sum", pair("v", "w", "t.loss")), by="t.sample_id"),
        "v w",
        "sum((t.loss)·(gathered_1.sum_1)) over"
        " t × gathered_1[sum_1 = sum((inner_product(v.gradient, w.gradient))) over v × w] by t.sample_id",
    ),
    "a side of several relations": (
        block("t v s", AVERAGE, by="t.sample_id", where="v.sample_id = s.sample_id, s.label = 1"),
        "v s",
        "avg(⟨t.gradient, gathered_1.avg_1⟩) over t ×"
        " gathered_1[avg_1 = avg(v.gradient) over v × s where v.sample_id = s.sample_id and s.label = 1]"
        " by t.sample_id",
    ),
    "a third relation counts its rows": (
        block("t v w", TOTAL, by="t.sample_id"),
        "w",
        "sum(⟨t.gradient, v.gradient⟩) · gathered_1.count_1 over"
        " t × v × gathered_1[count_1 = count over w] by t.sample_id",
    ),
    "an average of gradients, evenly counted": (
        block("t v", aggregate("avg", term("v.loss", vector("t.gradient"))), by="t.sample_id"),
        "v",
        "avg((gathered_1.avg_1)·t.gradient) over t × gathered_1[avg_1 = avg((v.loss)) over v] by t.sample_id",
    ),
    "the query outside is the other side": (
        block("v", aggregate("avg", term("loss", vector("gradient"), vector("v.gradient")))),
        "v",
        "avg((loss)·⟨gradient, gathered_1.avg_1⟩) over gathered_1[avg_1 = avg(v.gradient) over v]",
    ),
    "a name that is taken": (
        block("gathered_1 v", aggregate("avg", pair("gathered_1", "v")), by="gathered_1.sample_id"),
        "v",
        "avg(⟨gathered_1.gradient, gathered_2.avg_1⟩) over"
        " gathered_1 × gathered_2[avg_1 = avg(v.gradient) over v] by gathered_1.sample_id",
    ),
}


@pytest.mark.parametrize("name", GATHERED)
def test_what_becomes_of_a_block(name: str) -> None:
    before, side, text = GATHERED[name]
    assert block_text(gather_side(before, frozenset(side.split()))) == text


def test_both_sides_one_after_the_other() -> None:
    before = block("t v", AVERAGE, by="t.label, v.label")
    after = gather_side(gather_side(before, frozenset("v")), frozenset("t"))
    assert block_text(after) == (
        "avg(⟨gathered_1.avg_1, gathered_2.avg_1⟩) over gathered_1[avg_1 = avg(v.gradient) over v by v.label]"
        " × gathered_2[avg_1 = avg(t.gradient) over t by t.label] by gathered_2.key_1, gathered_1.key_1"
    )
    renamed = {to_sql(old.sql): to_sql(new) for old, new in after.renamed}
    assert renamed == {"v.label": "gathered_1.key_1", "t.label": "gathered_2.key_1"}


def test_a_key_that_is_renamed_twice() -> None:
    before = block("t v", TOTAL, by="t.label - v.label")
    after = gather_side(gather_side(before, frozenset("v")), frozenset("t"))
    first, *_ = after.renamed
    assert (to_sql(first[0].sql), to_sql(first[1])) == ("t.label - v.label", "gathered_2.key_1 - gathered_1.key_1")


# Where groups must vanish when the side has no row: avg and sum of nothing are NULL by themselves, a missing group is
# missing, but t's groups would stay although there was no pair, and t's own aggregates would not notice.
GUARDED: dict[str, tuple[Block, bool]] = {
    "groups of the other side": (block("t v", AVERAGE, by="t.sample_id"), True),
    "one group, all of which reads the side": (block("t v", AVERAGE, count()), False),
    "one group, part of which does not": (block("t v", AVERAGE, steady("min(t.loss)")), True),
    "one group, a sum that does not": (block("t v", AVERAGE, aggregate("sum", term("t.loss"))), True),
    "groups of its own": (block("t v", AVERAGE, by="v.label"), False),
    "groups by a tie": (block("t v", AVERAGE, by="t.label", where="t.label = v.label"), False),
}


@pytest.mark.parametrize("name", GUARDED)
def test_guards(name: str) -> None:
    before, guarded = GUARDED[name]
    (gather,) = gather_side(before, frozenset("v")).gathers()
    assert isinstance(gather, Gather)
    assert gather.guarded == guarded


REFUSED: dict[str, tuple[Block, str]] = {
    "no group": (block("t v", AVERAGE, by=None), "there is nothing to aggregate"),
    "no aggregate": (block("t v", by="t.sample_id"), "there is nothing to aggregate"),
    "an output of a row": (
        block("t v", AVERAGE, by="t.sample_id", outputs="v.loss"),
        "v.loss is neither aggregated nor a key",
    ),
    "a condition with a query in it": (
        block("t v", AVERAGE, where="t.loss > (SELECT max(o.loss) FROM outputs AS o WHERE o.sample_id = v.sample_id)"),
        "a sub-query ties the sides together",
    ),
    "a condition on the query outside": (
        block("t v", AVERAGE, where="v.loss > threshold"),
        "v.loss > threshold does not say whose columns it reads",
    ),
    "a key that reads the query outside": (
        block("t v", AVERAGE, by="v.loss > threshold"),
        "v.loss > threshold does not say whose columns it reads",
    ),
    "a weight of both sides": (
        block("t v", aggregate("avg", pair("t", "v", "t.loss + v.loss")), by="t.sample_id"),
        "t.loss + v.loss reads both sides",
    ),
    "an aggregate of both sides": (
        block("t v", AVERAGE, steady("max(t.loss + v.loss)"), by="t.sample_id"),
        "MAX(t.loss + v.loss) reads both sides",
    ),
    "distinct values in groups of its own": (
        block("t v", AVERAGE, steady("count(DISTINCT v.label)"), by="v.loss"),
        "count(DISTINCT …) over groups of a gathered side",
    ),
    "distinct values where it is tied": (
        block("t v", AVERAGE, steady("count(DISTINCT v.label)"), where="t.loss < v.loss"),
        "count(DISTINCT …) over groups of a gathered side",
    ),
    "a gradient of both sides": (
        block("t v", aggregate("avg", term(vector("coalesce(t.gradient, v.gradient)"), vector("t.gradient")))),
        "COALESCE(t.gradient, v.gradient) is a gradient of both sides",
    ),
    "an unevenly counted average of gradients": (
        block("t v", aggregate("avg", term(vector("v.gradient"))), by="t.label", where="t.label = v.label"),
        "an average of gradients whose rows count differently often",
    ),
    "a pattern of both sides": (
        block("t v", aggregate("avg", restricted("t", "v", on_left="concat(t.part, v.part)"))),
        "a restriction to layers reads both sides",
    ),
    "a pattern of its own, where no gradient is": (
        block("t w v", aggregate("avg", restricted("t", "w", on_left="v.part"))),
        "a restriction to layers ties the sides together",
    ),
    "an aggregate that is a gradient, with the other side's pattern": (
        block("t v", aggregate("sum", term(vector("v.gradient", "t.part"))), by="t.sample_id"),
        "a restriction to layers reads the other side",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_it_is_unsure_of(name: str) -> None:
    before, reason = REFUSED[name]
    with pytest.raises(Unsure) as caught:
        gather_side(before, frozenset("v"))
    assert str(caught.value) == reason


def test_nothing_of_the_old_block_is_changed() -> None:
    for before, side, _ in GATHERED.values():
        text = block_text(before)
        gather_side(before, frozenset(side.split()))
        assert block_text(before) == text


def test_what_a_hand_made_block_reads() -> None:
    assert scalar("t.loss + loss").reads == {"t", OUTER}
    assert isinstance(vector("t.gradient").sql, exp.Column)
