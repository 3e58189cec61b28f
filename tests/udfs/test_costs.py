"""Costs are positive and finite, grow with what there is to do, and pick what is known to be the best."""

from __future__ import annotations

from dataclasses import fields, replace
from math import isfinite

import pytest

from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.udfs import costs
from metaql.udfs.costs import CONTRACT, FULL, GRAM, PROBE, SCAN, SHIPPED, Side


def linear(inputs: int, outputs: int, kind: str = "linear", groups: int = 1, layout: str = FACTORED) -> Layer:
    weight = Parameter("fc.weight", (inputs, outputs) if kind == "embedding" else (outputs, inputs))
    return Layer("fc", kind, (weight,), layout, "float32", groups, inputs, outputs, 1)


# A decoder over 30,000 words: five positions of it beside forty words that were looked up.
TIED = replace(linear(64, 30_000, "tied"), positions=5, looked_up=40)
LAYERS = [TIED, linear(64, 16), linear(16, 512), linear(9, 64, "conv", groups=4), linear(3000, 32, "embedding")]
FORMS = [(None, None), (3.0, None), (None, 3.0), (3.0, 5.0)]


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.kind} {layer.width}")
@pytest.mark.parametrize("left, right", FORMS)
def test_more_takes_longer(layer: Layer, left: float | None, right: float | None) -> None:
    def seconds(samples: float, others: float, longer: float = 1) -> list[dict[str, float]]:
        own, other = (None if one is None else longer * one for one in (left, right))
        found = [costs.matrix(SHIPPED, layer, Side(samples, own), Side(others, other))]
        return [*found, costs.pairs(SHIPPED, layer, samples, own, other)]

    base = seconds(10, 10)
    assert all(isfinite(value) and value > 0 for one in base for value in one.values())
    for more in (seconds(20, 10), seconds(20, 20), seconds(10, 20), seconds(10, 10, longer=4)):
        for one, other in zip(base, more, strict=True):
            assert one.keys() == other.keys()
            assert all(other[way] >= one[way] for way in one)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: f"{layer.kind} {layer.width}")
@pytest.mark.parametrize("name", [field.name for field in fields(SHIPPED) if field.name != "forced"])
def test_a_slower_machine_takes_longer(layer: Layer, name: str) -> None:
    slower = replace(SHIPPED, **{name: 2 * getattr(SHIPPED, name)})
    for left, right in FORMS:
        one = costs.matrix(SHIPPED, layer, Side(100, left), Side(7, right))
        other = costs.matrix(slower, layer, Side(100, left), Side(7, right))
        assert all(other[way] >= one[way] for way in one)
        before, after = (costs.prices(machine, [(layer, left, right)]) for machine in (SHIPPED, slower))
        # A straight line through two points, between which the cheapest way may change.
        assert after.scan(5000) >= 0.999 * before.scan(5000)
        assert after.probe(50) >= 0.999 * before.probe(50)


@pytest.mark.parametrize(
    "layer, left, right, best",
    [
        (linear(1024, 1024), Side(2000, 1), Side(1, 1), GRAM),
        (linear(1024, 1024), Side(2000, 1), Side(1, None), CONTRACT),
        (linear(10, 16), Side(1000, 64), Side(1, 64), CONTRACT),
        (linear(64, 64), Side(1000, 64), Side(1000, 64), FULL),
        (linear(64, 64), Side(1000, None), Side(1, 100), FULL),
        (linear(30_000, 64, "embedding"), Side(1000, 4), Side(1, 2), GRAM),
        (TIED, Side(100, 5), Side(1, 5), GRAM),
        (TIED, Side(100, 5), Side(1, None), CONTRACT),
        (TIED, Side(100, 5), Side(1, 50_000), CONTRACT),
        (linear(30_000, 64, "embedding"), Side(50_000, 4), Side(1, 4000), CONTRACT),
    ],
)
def test_known_choices(layer: Layer, left: Side, right: Side, best: str) -> None:
    assert SHIPPED.choose(costs.matrix(SHIPPED, layer, left, right)) == best


def test_scan_or_probe_by_selectivity() -> None:
    prices = costs.prices(SHIPPED, [(linear(128, 128), 1.0, None)])
    chosen = [SHIPPED.choose(prices.ways(50_000, share)) for share in (0.001, 0.01, 0.9, 1.0)]
    assert chosen == [PROBE, PROBE, SCAN, SCAN]


def test_a_forced_way_is_taken_where_it_exists() -> None:
    forced = replace(SHIPPED, forced=frozenset({GRAM, PROBE}))
    assert forced.choose({GRAM: 9.0, CONTRACT: 1.0}) == GRAM
    assert forced.choose({CONTRACT: 2.0, FULL: 1.0}) == FULL
