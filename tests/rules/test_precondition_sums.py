"""Where a preconditioner moves from many gradients to their sum, and where it may not."""

from __future__ import annotations

import pytest

from metaql.logical import Block
from metaql.logical_text import block_text
from metaql.rules.gather_side import gather_side
from metaql.rules.precondition_sums import precondition_sums
from tests.rules.hand_made import aggregate, block, count, term, vector

T, V = vector("t.gradient"), vector("v.gradient")
PT, PV = vector("t.gradient", by="'m'"), vector("v.gradient", by="'m'")


def gathered(*terms: object, by: str = "t.sample_id", function: str = "avg", where: str = "", side: str = "v") -> Block:
    """An aggregate of these terms over t × v, with v gathered."""
    made = block("t v", aggregate(function, *terms), count("v.label"), by=by, where=where)  # type: ignore[arg-type]
    return gather_side(made, frozenset(side.split()))


MOVED: dict[str, tuple[Block, str]] = {
    "of the side's own gradients": (
        gathered(term(T, PV)),
        "avg(⟨t.gradient, gathered_1.avg_1⟩), count(*) weighted gathered_1.count_2 over"
        " t × gathered_1[avg_1 = precondition(avg(v.gradient), 'm'), count_2 = count over v] by t.sample_id",
    ),
    "of the other side's": (
        gathered(term(PT, V)),
        "avg(⟨t.gradient, gathered_1.avg_1_3⟩), count(*) weighted gathered_1.count_2 over"
        " t × gathered_1[count_2 = count, avg_1_3 = precondition(avg(v.gradient), 'm') over v] by t.sample_id",
    ),
    "of both: each its own": (
        gathered(term(vector("t.gradient", by="'n'"), PV)),
        "avg(⟨precondition(t.gradient, 'n'), gathered_1.avg_1⟩), count(*) weighted gathered_1.count_2 over"
        " t × gathered_1[avg_1 = precondition(avg(v.gradient), 'm'), count_2 = count over v] by t.sample_id",
    ),
    "weights stay with the sum": (
        gathered(term("v.loss", "t.loss", T, PV), function="sum"),
        "sum((t.loss)·⟨t.gradient, gathered_1.sum_1⟩), count(*) weighted gathered_1.count_2 over"
        " t × gathered_1[sum_1 = precondition(sum((v.loss)·v.gradient), 'm'), count_2 = count over v] by t.sample_id",
    ),
    "groups have a sum each": (
        gathered(term(PT, V), by="v.label"),
        "avg(⟨t.gradient, gathered_1.avg_1_3⟩), count(*) weighted gathered_1.count_2 over"
        " t × gathered_1[count_2 = count, avg_1_3 = precondition(avg(v.gradient), 'm') over v by v.label]"
        " by gathered_1.key_1",
    ),
    "a restriction of all comes after it": (
        gathered(term(vector("t.gradient", "'fc'"), PV)),
        "avg(⟨t.gradient, gathered_1.avg_1⟩), count(*) weighted gathered_1.count_2 over"
        " t × gathered_1[avg_1 = precondition(avg(v.gradient), 'm')|'fc', count_2 = count over v] by t.sample_id",
    ),
    "a restriction of the sum comes before that of the other side": (
        gathered(term(PT, vector("v.gradient", "'fc'"))),
        "avg(⟨t.gradient, gathered_1.avg_1_3⟩), count(*) weighted gathered_1.count_2 over"
        " t × gathered_1[count_2 = count, avg_1_3 = precondition(avg(v.gradient|'fc'), 'm') over v] by t.sample_id",
    ),
    "a sum that is also read as it is": (
        gathered(term(PT, V), term(T, V)),
        "avg(⟨t.gradient, gathered_1.avg_1_3⟩ + ⟨t.gradient, gathered_1.avg_1⟩), count(*) weighted gathered_1.count_2"
        " over t × gathered_1[avg_1 = avg(v.gradient), count_2 = count,"
        " avg_1_3 = precondition(avg(v.gradient), 'm') over v] by t.sample_id",
    ),
}

STAYS: dict[str, Block] = {
    "nothing is preconditioned": gathered(term(T, V)),
    "nothing is gathered": block("t v", aggregate("avg", term(T, PV)), by="t.sample_id"),
    "restrictions that differ within the side": gathered(term(T, vector("v.gradient", "v.layer", by="'m'"))),
    "what is not symmetric, of the other side's": gathered(term(vector("t.gradient", by="'lissa'"), V)),
    "a restriction by the other side": gathered(term(vector("t.gradient", "t.layer", by="'m'"), V)),
}


@pytest.mark.parametrize("about", MOVED)
def test_moves(about: str) -> None:
    before, expected = MOVED[about]
    after = precondition_sums(before)
    assert after is not None
    assert block_text(after) == expected
    assert precondition_sums(after) is None


@pytest.mark.parametrize("about", STAYS)
def test_stays(about: str) -> None:
    assert precondition_sums(STAYS[about]) is None
