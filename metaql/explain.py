"""EXPLAIN of queries over gradients: one line a node, its estimates, what was chosen, and what it was chosen over."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import duckdb

from metaql.catalogue import Catalogue
from metaql.choose import Alternative
from metaql.logical_text import block_text
from metaql.pairs import LIST
from metaql.parse import explain_options
from metaql.physical import Node, Score, is_of_gradients, physical
from metaql.planner import Plan
from metaql.select_planner import Planned
from metaql.storage.schema import Layer
from metaql.strategies import Layered, by_layer, reading
from metaql.udfs.costs import CALL_ROWS, PROBE, SCAN
from metaql.udfs.counters import Counts
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource

# Of a model with hundreds of layers those that take longest are shown.
MOST_LAYERS = 12


# Other options, FORMAT for one, ask for DuckDB's own plan of the SQL that is run.
_OPTIONS = frozenset({"analyze", "verbose"})


def is_explained(plan: Plan) -> bool:
    """Whether the statement is an EXPLAIN that is ours: of a query that has to do with gradients."""
    if not plan.prefix or plan.tree is None or not explain_options(plan.prefix) <= _OPTIONS:
        return False
    return bool(plan.selects) or is_of_gradients(plan.tree)


# Queries that take so many seconds are warned of.
MINUTES = 120.0
# Seconds that a pair of its own costs, besides the product.
PAIR = 1e-7
# With fewer pairs in the largest collection nothing takes minutes.
FEWEST_PAIRS = 10**8


@dataclass(frozen=True)
class Explainer:
    """What the estimates are made from."""

    catalogue: Catalogue
    source: StoreSource
    session: Session

    def lines(self, plan: Plan, verbose: bool = False, measured: Measured | None = None) -> list[str]:
        """The plan of a statement as text. ``measured`` puts what happened beside what was expected."""
        assert plan.tree is not None
        root = physical(plan.tree, self.catalogue)
        if measured is not None and sum(node.score is not None for node in _nodes(root)) == 1:
            measured = replace(measured, one_score=True)
        found = [*self._node(root, "", "", measured), *self._choices(plan)]
        if verbose:
            found += [*_rules(plan), "", "SQL for DuckDB:", f"  {plan.text[len(plan.prefix) :]}"]
        if measured is not None:
            found += measured.totals()
        return found

    def count(self, query: str) -> int | None:
        """The number that a query yields; None where DuckDB can't run it by itself."""
        try:
            return int(self.catalogue.database.answer(query)[0][0])
        except duckdb.Error:
            return None

    def explained(self, plan: Plan, run: Callable[[str], Any]) -> list[str]:
        """The lines of an EXPLAIN. With ANALYZE the query is run, for its profile."""
        options = explain_options(plan.prefix)
        if "analyze" not in options:
            return self.lines(plan, "verbose" in options)
        before, begin = self.session.counters.now(), time.perf_counter()
        profile = run(f"EXPLAIN (ANALYZE, FORMAT JSON) {plan.text[len(plan.prefix) :]}").fetchall()[0][1]
        counts, seconds = self.session.counters.now() - before, time.perf_counter() - begin
        found = Measured(counts, seconds, _rows(json.loads(profile)), self.count)
        return self.lines(plan, "verbose" in options, found)

    def warning(self, plan: Plan) -> str | None:
        """What to tell who asks for so many products that they take minutes; None for any other plan."""
        assert plan.tree is not None
        seconds, pairs = 0.0, 0.0
        for node in _nodes(physical(plan.tree, self.catalogue)):
            layers = self._layers(node.score) if node.score else None
            if node.score is not None and node.score.rows.value is not None:
                pairs = max(pairs, node.score.rows.value)
                known = sum(one.ways[one.way] for one in layers or ())
                seconds += known if node.score.tiles or node.score.scan else max(known, PAIR * node.score.rows.value)
        if seconds < MINUTES:
            return None
        why = "; ".join(dict.fromkeys(reason for one in plan.selects for reason in _reasons(one)))
        return (
            f"this query multiplies about {pairs:,.0f} pairs of gradients, which takes an estimated"
            f" {seconds / 60:,.0f} minutes{': ' + why if why else ''}. EXPLAIN shows what takes long"
        )

    def _node(self, node: Node, first: str, rest: str, measured: Measured | None) -> Iterator[str]:
        yield first + node.text + _aligned(first + node.text, self._estimates(node, measured))
        inner = "│  " if node.children else "   "
        if node.score is not None:
            yield from (f"{rest}{inner}{line}" for line in self._ways(node.score))
        for number, child in enumerate(node.children):
            last = number == len(node.children) - 1
            yield from self._node(child, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "), measured)

    def _estimates(self, node: Node, measured: Measured | None) -> str:
        parts = [f"{node.rows} row{'' if node.rows.value == 1 else 's'}"] if node.rows.value is not None else []
        layers = self._layers(node.score) if node.score else None
        if layers:
            parts += [f"{_bytes(sum(one.bytes for one in layers))}", f"{_si(sum(one.flops for one in layers))}FLOP"]
            parts += [_time(sum(one.ways[one.way] for one in layers))]
        if measured is not None:
            parts += measured.beside(node)
        return ", ".join(parts)

    def _ways(self, score: Score) -> Iterator[str]:
        """Layer by layer, what multiplies the gradients, and what else could."""
        layers = self._layers(score)
        if layers is None:
            yield "per layer by what the rows turn out to be"
            return
        shown = sorted(layers, key=lambda one: -one.ways[one.way])[:MOST_LAYERS]
        for one in [one for one in layers if one in shown]:
            others = [f"{way} {_time(one.ways[way])}" for way in sorted(one.ways) if way != one.way]
            over = f" (instead of {', '.join(others)})" if others else ""
            yield f"{one.layer.name}: {one.way} {_time(one.ways[one.way])}{over}"
        if len(layers) > len(shown):
            yield f"… and {len(layers) - len(shown)} more layers"
        yield self._reading(score)

    def _reading(self, score: Score) -> str:
        device = self.source.device or "cpu"
        if score.tiles:
            return f"as matrices, {CALL_ROWS:,} rows with up to {LIST} members at a time, on {device}"
        right = score.right
        if right is None or min(score.left.rows.value or 0, right.rows.value or 0) != 1:
            return f"rows as they come, on {device}"
        rows = max(score.left.rows.value or 0, right.rows.value or 0)
        every = max((one.rows for one in self.source.store.manifest.collections), default=0) or rows
        ways = reading(self._chosen(score), self.session.costs, every, rows)
        way = SCAN if score.scan else self.session.costs.choose(ways)
        other = PROBE if way == SCAN else SCAN
        return f"{way} {_time(ways[way])} (instead of {other} {_time(ways[other])}), on {device}"

    def _layers(self, score: Score) -> list[Layered] | None:
        return by_layer(score, self._chosen(score), self.session.costs, self.source.row_bytes)

    def _chosen(self, score: Score) -> list[Layer]:
        """The layers that a product is over."""
        names = {layer.name for layer in self.source.space.layers}
        for operand in (score.left, score.right):
            for pattern in operand.patterns if operand else ():
                names &= {one.layer.name for one in self.source.space.select(pattern)}
        return [layer for layer in self.source.space.layers if layer.name in names]

    def _choices(self, plan: Plan) -> Iterator[str]:
        for planned in plan.selects:
            yield from _choice(planned)


@dataclass(frozen=True)
class Measured:
    """What EXPLAIN ANALYZE saw: the functions' counts, DuckDB's own profile, and how to count a node's rows."""

    counts: Counts
    seconds: float
    rows: int
    count: Callable[[str], int | None]
    # Whether all products are those of one node.
    one_score: bool = False

    def beside(self, node: Node) -> list[str]:
        """Behind a node's estimates."""
        if node.score is not None:
            products = self.counts.scored + self.counts.found
            known = self.one_score and products
            return [f"true {products:,} in {_time(self.counts.seconds)}"] if known else []
        counted = self.count(node.query) if node.query else None
        return [f"true {counted:,}"] if counted is not None else []

    def totals(self) -> list[str]:
        """Of the whole query."""
        counts = self.counts
        calls = f"{counts.calls:,} call{'' if counts.calls == 1 else 's'}"
        return [
            "",
            f"Result: {self.rows:,} row{'' if self.rows == 1 else 's'} in {_time(self.seconds)}",
            f"Scored: {counts.scored:,} products in {_time(counts.seconds)} of kernels, {calls}",
            f"Cache: {counts.found:,} hits, {counts.scored:,} misses",
        ]


def _rows(profile: dict[str, Any]) -> int:
    """Rows of the topmost operator that has any."""
    nodes = list(profile.get("operator") or profile.get("children") or [])
    while nodes:
        node = nodes.pop(0)
        if node.get("type") not in ("RESULT_COLLECTOR", "EXPLAIN_ANALYZE"):
            return int(node.get("intermediate_rows") or node.get("operator_cardinality") or 0)
        nodes = [*node.get("children", []), *nodes]
    return 0


def _choice(planned: Planned) -> Iterator[str]:
    if planned.choice is None:
        yield f"Pair by pair: {planned.reason}"
        return
    best, *others = planned.choice.alternatives
    if best.block.keys is None and not best.gathered and not best.block.aggregates:
        return
    yield f"Chosen: {_form(best)}"
    yield from (f"  instead of {_form(one)}" for one in others)
    if not best.gathered:
        yield from (f"  not gathered: {reason}" for reason in planned.choice.reasons)


def _reasons(planned: Planned) -> tuple[str, ...]:
    """Why a SELECT runs pair by pair."""
    if planned.choice is None:
        return (planned.reason,) if planned.reason else ()
    return () if planned.choice.best.gathered else planned.choice.reasons


def _form(alternative: Alternative) -> str:
    sides = " and ".join(", ".join(sorted(side)) for side in alternative.gathered)
    text = f"gather {sides}" if sides else "pair by pair"
    return f"{text}, {alternative.cost.total} vector operations"


def _rules(plan: Plan) -> Iterator[str]:
    for planned in plan.selects:
        if planned.choice is None or planned.block is None:
            continue
        yield ""
        yield "Bound: " + block_text(planned.block)
        for name, block in planned.choice.best.rules:
            yield f"After {name}: " + block_text(block)


def _nodes(node: Node) -> Iterator[Node]:
    yield node
    for child in node.children:
        yield from _nodes(child)


def _aligned(text: str, estimates: str) -> str:
    return f"{' ' * max(2, 64 - len(text))}{estimates}" if estimates else ""


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds / 1e-6)} µs"


def _bytes(count: float) -> str:
    return f"{_si(count)}B"


def _si(count: float) -> str:
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{_digits(count / size)} {prefix}"
    return f"{_digits(count)} "


def _digits(value: float) -> str:
    """Two digits that count, and no fewer than there are before the point."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"
