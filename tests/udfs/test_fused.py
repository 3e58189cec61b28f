"""Layers with the same input are multiplied as one, and only those."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metaql.storage.blocks import Factored
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.udfs.costs import CONTRACT, FULL, GRAM, Constants
from metaql.udfs.fused import fused_terms
from metaql.udfs.rows import Rows
from metaql.udfs.session import Session
from metaql.udfs.sources import StoreSource
from metaql.udfs.tiles import every_pair

ROWS = 18
LEFT, RIGHT = np.array([3, 0, 12, 12, 8]), np.array([1, 17, 2])


def linear(name: str, inputs: int, outputs: int, bias: bool) -> Layer:
    shapes = {"weight": (outputs, inputs), "bias": (outputs,)}
    parameters = tuple(Parameter(f"{name}.{part}", shape) for part, shape in shapes.items())[: 1 + bias]
    return Layer(name, "linear", parameters, FACTORED, "float64", 1, inputs, outputs, 3)


def factors(suffix: torch.Tensor, outputs: int, offsets: torch.Tensor | None) -> Factored:
    return Factored(suffix, torch.randn(len(suffix), outputs, dtype=torch.float64), ROWS, offsets)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("pattern", ["", "*.weight"])
@pytest.mark.parametrize("way", [GRAM, CONTRACT, FULL])
def test_layers_of_one_input(
    bias: bool, ragged: bool, pattern: str, way: str, plain: SimpleNamespace, fake_store: Any
) -> None:
    """Query, key and value share theirs; "late" does in the first rows only, "other" in none."""
    torch.manual_seed(0)
    lengths = torch.randint(0, 4, (ROWS,)) if ragged else torch.full((ROWS,), 3)
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    shared, other = (torch.randn(int(offsets[-1]), 4, dtype=torch.float64) for _ in range(2))
    late = torch.where(torch.arange(len(shared))[:, None] < offsets[6], shared, other)
    given = offsets if ragged else None
    blocks = {
        linear("query", 4, 5, bias): factors(shared, 5, given),
        linear("key", 4, 2, bias): factors(shared, 2, given),
    }
    blocks[linear("value", 4, 2, bias)] = factors(shared.clone(), 2, given)
    blocks[linear("late", 4, 3, bias)] = factors(late, 3, given)
    blocks[linear("other", 4, 5, bias)] = factors(other, 5, given)
    session = Session()
    session.costs = Constants(forced=frozenset({way}))
    source = StoreSource(fake_store(blocks), "world")
    session.add(source)
    terms = source.space.shared(pattern, source.space, "")
    expected = np.zeros((len(LEFT), len(RIGHT)))
    for layer, block in blocks.items():
        kept = layer.parameters[0].width if pattern else layer.width
        gradients = plain.gradients(layer, block)[:, :kept]
        expected += gradients[LEFT] @ gradients[RIGHT].T
    for left, right, wanted in ((LEFT, RIGHT, expected), (RIGHT, LEFT, expected.T)):
        found = every_pair(session, terms, Rows(source, left), Rows(source, right))
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)


def test_which_are_fused(fake_store: Any) -> None:
    suffix, other = torch.randn(2, ROWS, 4, dtype=torch.float64)
    with_bias, without = linear("b", 4, 2, bias=True), linear("c", 4, 3, bias=False)
    blocks = {linear("a", 4, 2, bias=True): suffix, with_bias: suffix.clone(), without: suffix}
    blocks |= {linear("d", 4, 2, bias=False): suffix, linear("e", 4, 2, bias=False): other}
    found = fake_store({layer: factors(values, layer.output_width, None) for layer, values in blocks.items()})
    source = StoreSource(found, "world")
    terms = source.space.shared("", source.space, "")
    groups = fused_terms(terms, Rows(source, LEFT), Rows(source, RIGHT))
    assert [[term.left.name for term in group] for group in groups] == [["a", "b"], ["c", "d"], ["e"]]
