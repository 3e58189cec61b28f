"""Numbers of rows say how sure they are; what is not known stays so through every computation."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import duckdb
import pytest
from sqlglot import exp

from metaql.logical import Gather, Relation, Scalar
from metaql.rules.gather_side import gather_side
from metaql.stats import ONE, UNKNOWN, Count, Precision, Statistics
from tests.rules.hand_made import aggregate, block, pair, scalar

EXACT, ESTIMATED = Precision.EXACT, Precision.ESTIMATED
COUNTS = (Count(6, EXACT), Count(0, EXACT), Count(4, ESTIMATED), UNKNOWN)


@pytest.mark.parametrize("left, right", list(product(COUNTS, COUNTS)))
def test_a_result_is_as_sure_as_what_it_is_made_of(left: Count, right: Count) -> None:
    for result in (left * right, left + right):
        assert result.precision == max(left.precision, right.precision)
        assert (result.value is None) == (result.precision == Precision.UNKNOWN)
    assert left * right == right * left
    assert left + right == right + left


def test_arithmetic() -> None:
    six, four = Count(6, EXACT), Count(4, ESTIMATED)
    assert six * four == Count(24, ESTIMATED)
    assert six + six == Count(12, EXACT)
    assert six.over(four) == Count(1.5, ESTIMATED)
    # It need not come out even, and nothing is divided by less than one.
    assert six.over(Count(3, EXACT)) == Count(2, ESTIMATED)
    assert six.over(Count(0, EXACT)) == Count(6, ESTIMATED)
    assert six.over(UNKNOWN) == UNKNOWN.over(six) == UNKNOWN
    assert Count(0, EXACT).at_least_one() == ONE
    assert Count(0.5, ESTIMATED).at_least_one() == Count(1, ESTIMATED)
    assert six.at_least_one() == six
    assert UNKNOWN.at_least_one() == UNKNOWN
    # No rows times an unknown number of others may well be none; but a missing number is not one that is known.
    assert Count(0, EXACT) * UNKNOWN == UNKNOWN


def test_how_they_are_printed() -> None:
    assert list(map(str, (Count(12345, EXACT), Count(12345.6, ESTIMATED), UNKNOWN))) == ["12,345", "~12,346", "unknown"]


class Asked:
    """Answers 7 to a count and 70 to a plan, or whatever else is wanted, and keeps the texts."""

    def __init__(self, answer: Any = None) -> None:
        self.texts: list[str] = []
        self._answer = answer

    def __call__(self, text: str) -> list[tuple[Any, ...]]:
        self.texts.append(text)
        if isinstance(self._answer, Exception):
            raise self._answer
        if not text.startswith("EXPLAIN"):
            return [(7,)]
        return [("physical_plan", json.dumps(self._answer or [plan("70")]))]


def plan(count: str | None, *children: Any) -> dict[str, Any]:
    """A node of DuckDB's plans."""
    return {"extra_info": {"Estimated Cardinality": count} if count else {}, "children": list(children)}


def statistics(answer: Asked, stored: str = "t v w") -> Statistics:
    return Statistics(answer, lambda item: item.name in stored.split(), "")


def relations(aliases: str) -> tuple[Relation, ...]:
    return tuple(Relation(one, exp.to_table(one), frozenset({"sample_id"})) for one in aliases.split())


def where(*texts: str) -> tuple[Scalar, ...]:
    return tuple(map(scalar, texts))


def test_what_can_not_change_is_counted() -> None:
    asked = Asked()
    found = statistics(asked).rows(relations("t v"), where("t.loss > 1", "t.label = v.label"))
    assert found == Count(7, EXACT)
    assert asked.texts == ["SELECT count(*) FROM t, v WHERE (t.loss > 1) AND (t.label = v.label)"]


def test_of_anything_else_duckdbs_estimate_is_taken() -> None:
    asked = Asked()
    assert statistics(asked, "t").rows(relations("t mine"), ()) == Count(70, ESTIMATED)
    assert asked.texts == ["EXPLAIN (FORMAT JSON) SELECT 1 FROM t, mine"]
    assert statistics(asked, "").groups(relations("mine"), (), where("mine.label")) == Count(70, ESTIMATED)
    assert asked.texts[-1] == "EXPLAIN (FORMAT JSON) SELECT DISTINCT mine.label FROM mine"


@pytest.mark.parametrize("condition", ["t.loss > ?", "t.loss > (SELECT avg(loss) FROM o)", "t.loss > loss"])
def test_conditions_whose_values_are_not_known_here(condition: str) -> None:
    asked = Asked()
    assert statistics(asked).rows(relations("t"), where("t.loss > 1", condition)) == Count(70, ESTIMATED)
    assert asked.texts == ["EXPLAIN (FORMAT JSON) SELECT 1 FROM t WHERE (t.loss > 1)"]


def test_the_ctes_that_are_seen_from_there() -> None:
    asked = Asked()
    Statistics(asked, lambda _: False, "WITH a AS (SELECT 1) ").rows(relations("a"), ())
    assert asked.texts == ["EXPLAIN (FORMAT JSON) WITH a AS (SELECT 1) SELECT 1 FROM a"]


def test_values_of_keys_are_a_sketch() -> None:
    asked = Asked()
    found = statistics(asked).groups(relations("t"), where("t.loss > 1"), where("t.label", "t.loss"))
    assert found == Count(7, ESTIMATED)
    assert asked.texts == ["SELECT approx_count_distinct(hash(t.label, t.loss)) FROM t WHERE (t.loss > 1)"]


def test_a_key_that_tells_rows_apart_has_as_many_values_as_there_are_rows() -> None:
    asked = Asked()
    assert statistics(asked).groups(relations("t"), (), where("t.label", "t.sample_id")) == Count(7, EXACT)
    assert asked.texts == ["SELECT count(*) FROM t"]
    # In a join its values come several times.
    assert statistics(asked).groups(relations("t v"), (), where("t.sample_id")) == Count(7, ESTIMATED)


@pytest.mark.parametrize("alone, expected", [("5", 5), ("700", 70), (None, 70)])
def test_a_join_has_no_more_groups_than_the_keys_relations_alone(alone: str | None, expected: int) -> None:
    texts: list[str] = []

    def answer(text: str) -> list[tuple[Any, ...]]:
        texts.append(text)
        return [("physical_plan", json.dumps([plan("70" if ", mine" in text else alone)]))]

    known = Statistics(answer, lambda item: item.name == "t", "")
    found = known.groups(relations("t mine"), where("mine.x > 1", "t.y = mine.y"), where("mine.label"))
    assert found == Count(expected, ESTIMATED)
    assert texts[-1] == "EXPLAIN (FORMAT JSON) SELECT DISTINCT mine.label FROM mine WHERE (mine.x > 1)"


def test_no_keys_and_no_relations() -> None:
    asked = Asked()
    assert statistics(asked).groups(relations("t"), (), ()) == ONE
    assert statistics(asked).rows((), ()) == ONE
    assert not asked.texts


def test_nothing_is_asked_twice() -> None:
    asked = Asked()
    known, pairs = statistics(asked), relations("t v")
    for _ in range(3):
        known.rows(pairs, ())
        known.rows(relations("t v"), ())
    assert asked.texts == ["SELECT count(*) FROM t, v"]


def test_a_gathered_side_has_a_row_for_each_group() -> None:
    asked = Asked()
    before = block("t v w", aggregate("sum", pair("t", "v")), where="t.label = v.label, w.loss > 1")
    after = gather_side(before, frozenset("v"))
    (gather,) = after.gathers()
    known = statistics(asked)
    assert isinstance(gather, Gather)
    assert known.gathered(gather) == Count(7, ESTIMATED)
    # Beside others: these under their own conditions, times its groups.
    assert known.rows(after.relations, after.conjuncts) == Count(49, ESTIMATED)
    assert asked.texts == [
        "SELECT approx_count_distinct(hash(v.label)) FROM v",
        "SELECT count(*) FROM t, w WHERE (w.loss > 1)",
    ]


@pytest.mark.parametrize("answer", [duckdb.Error("no such table"), [plan(None)], [plan(None, plan(None))]])
def test_where_duckdb_does_not_say(answer: Any) -> None:
    assert statistics(Asked(answer), "").rows(relations("mine"), ()) == UNKNOWN


def test_what_can_not_be_counted_after_all() -> None:
    assert statistics(Asked(duckdb.Error("a function raised"))).rows(relations("t"), ()) == UNKNOWN


def test_the_estimate_at_the_top_of_a_plan() -> None:
    nested = [plan(None, plan(None, plan("31", plan("62"))))]
    assert statistics(Asked(nested), "").rows(relations("mine"), ()) == Count(31, ESTIMATED)
    assert statistics(Asked(plan("8")), "").rows(relations("mine"), ()) == Count(8, ESTIMATED)
