"""Every kernel against the loop over samples, for every kind of layer and every pair of layouts."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metaql.storage.blocks import Factored, cut
from metaql.udfs import contract, gram, kernels
from metaql.udfs.costs import CONTRACT, FULL, GRAM, Constants
from metaql.udfs.patterns import Term
from metaql.udfs.slices import move, padded, row_dots, steps, take

KINDS = ("linear", "conv", "embedding", "tied", "norm")
FORMS = ("fixed", "ragged", "full")
# As it is chosen, and each way by force, where it exists.
MACHINES = [Constants(), *(Constants(forced=frozenset({way})) for way in (GRAM, CONTRACT, FULL))]
# Sums of a few hundred float64 products in another order.
TOLERANCE = 1e-12


def places_of(count: int) -> list[tuple[int, ...]]:
    return [(0,)] if count == 1 else [(0,), (1,), (0, 1)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_form", FORMS)
@pytest.mark.parametrize("right_form", FORMS)
@pytest.mark.parametrize("seed", range(4))
def test_scores_equal_the_loop(
    kind: str, left_form: str, right_form: str, seed: int, plain: SimpleNamespace, draw: SimpleNamespace
) -> None:
    rng = np.random.default_rng(seed)
    layer = draw.layer(rng, kind)
    left, right = draw.block(rng, layer, 6, left_form), draw.block(rng, layer, 6, right_form)
    g, h = plain.gradients(layer, left), plain.gradients(layer, right)
    for places in places_of(len(layer.parameters)):
        term = Term(layer, layer, tuple((place, place) for place in places))
        expected = (g * plain.selected(layer, places)) @ h.T
        for machine in MACHINES:
            matrix, pairs = kernels.matrix(term, left, right, machine), kernels.pairs(term, left, right, machine)
            np.testing.assert_allclose(matrix, expected, atol=TOLERANCE, rtol=TOLERANCE)
            np.testing.assert_allclose(pairs, np.diag(expected), atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "tied"])
@pytest.mark.parametrize("form", ["fixed", "ragged"])
@pytest.mark.parametrize("seed", range(3))
def test_gram_and_contraction_agree(
    kind: str, form: str, seed: int, plain: SimpleNamespace, draw: SimpleNamespace
) -> None:
    rng = np.random.default_rng(seed)
    layer = draw.layer(rng, kind)
    left, right = draw.factors(rng, layer, 5, form), draw.factors(rng, layer, 5, "ragged")
    g, h = plain.gradients(layer, left), plain.gradients(layer, right)
    laid_out, bias = torch.from_numpy(h), layer.has_bias
    expected = g @ h.T
    by_gram = gram.gram_matrix(layer, left, right, True, bias)
    one_by_one = torch.stack([contract.contract(layer, left, one, True, bias) for one in laid_out], 1)
    by_contraction = contract.contract_matrix(layer, left, laid_out, True, bias)
    pairs = gram.gram_pairs(layer, left, right, True, bias)
    contracted = contract.contract_pairs(layer, left, laid_out, True, bias)
    for result, wanted in (
        (by_gram, expected),
        (one_by_one, expected),
        (by_contraction, expected),
        (pairs, np.diag(expected)),
        (contracted, np.diag(expected)),
    ):
        np.testing.assert_allclose(result, wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "tied"])
@pytest.mark.parametrize("form", ["fixed", "ragged"])
@pytest.mark.parametrize("alike", [False, True])
def test_weighted_sum(kind: str, form: str, alike: bool, plain: SimpleNamespace, draw: SimpleNamespace) -> None:
    rng = np.random.default_rng(1)
    layer = draw.layer(rng, kind)
    block, weights = draw.factors(rng, layer, 7, form), np.full(7, 0.3) if alike else rng.standard_normal(7)
    expected = weights @ plain.gradients(layer, block)
    result = contract.weighted_sum(layer, block, torch.from_numpy(weights))
    np.testing.assert_allclose(result, expected, atol=TOLERANCE)


@pytest.mark.parametrize("form", FORMS)
def test_layers_that_hold_different_parameters_of_a_module(
    form: str, plain: SimpleNamespace, draw: SimpleNamespace
) -> None:
    """One store may have recorded a bias alone that another has with its weight."""
    rng = np.random.default_rng(2)
    layer = draw.layer(rng, "linear")
    while not layer.has_bias:
        layer = draw.layer(rng, "linear")
    alone = type(layer)("fc.bias", "bias", layer.parameters[1:], "full", "float64")
    left, right = draw.block(rng, layer, 4, form), draw.block(rng, alone, 4, "full")
    g = plain.gradients(layer, left)[:, layer.parameters[0].width :]
    expected = g @ plain.gradients(alone, right).T
    np.testing.assert_allclose(kernels.matrix(Term(layer, alone, ((1, 0),)), left, right), expected, atol=1e-12)
    np.testing.assert_allclose(kernels.matrix(Term(alone, layer, ((0, 1),)), right, left), expected.T, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_no_samples(kind: str, draw: SimpleNamespace) -> None:
    rng = np.random.default_rng(3)
    layer = draw.layer(rng, kind)
    term = Term(layer, layer, ((0, 0),))
    for form in FORMS:
        none, some = draw.block(rng, layer, 0, form), draw.block(rng, layer, 3, form)
        for machine in MACHINES:
            assert kernels.pairs(term, none, none, machine).shape == (0,)
            assert kernels.matrix(term, none, some, machine).shape == (0, 3)
            assert kernels.matrix(term, some, none, machine).shape == (3, 0)


def test_the_wider_type_counts(draw: SimpleNamespace) -> None:
    rng = np.random.default_rng(4)
    layer = draw.layer(rng, "embedding")
    block = draw.factors(rng, layer, 3, "fixed")
    single = move(block, torch.device("cpu"), torch.float32)
    assert isinstance(single, Factored)
    assert single.suffix.dtype == torch.int64
    assert kernels.matrix(Term(layer, layer, ((0, 0),)), single, block).dtype == torch.float64


@pytest.mark.parametrize("form", ["fixed", "ragged"])
def test_cutting_taking_and_padding_keep_the_gradients(
    form: str, plain: SimpleNamespace, draw: SimpleNamespace
) -> None:
    rng = np.random.default_rng(5)
    layer = draw.layer(rng, "linear")
    block = draw.factors(rng, layer, 9, form)
    whole = plain.gradients(layer, block)
    np.testing.assert_array_equal(plain.gradients(layer, cut(block, slice(2, 6))), whole[2:6])
    np.testing.assert_array_equal(plain.gradients(layer, take(block, torch.tensor([4, 4, 0]))), whole[[4, 4, 0]])
    np.testing.assert_array_equal(plain.gradients(layer, padded(block)), whole)


def test_steps_cover_all_rows_once() -> None:
    assert [(part.start, part.stop) for part in steps(10, 4, budget=48)] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    assert list(steps(0, 4)) == []
    assert list(steps(2, 1e12)) == [slice(0, 1), slice(1, 2)]


@pytest.mark.parametrize("budget", [8, 200])
def test_laid_out_gradients_are_made_a_few_at_a_time(
    budget: int, plain: SimpleNamespace, draw: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LAID_OUT_BUDGET", budget)
    monkeypatch.setattr(kernels, "STRETCH", 5)
    rng = np.random.default_rng(6)
    layer = draw.layer(rng, "conv")
    left, right = draw.factors(rng, layer, 7, "fixed"), draw.factors(rng, layer, 7, "ragged")
    expected = plain.gradients(layer, left) @ plain.gradients(layer, right).T
    term = Term(layer, layer, tuple((place, place) for place in range(len(layer.parameters))))
    for machine in MACHINES:
        np.testing.assert_allclose(kernels.matrix(term, left, right, machine), expected, atol=TOLERANCE)
        np.testing.assert_allclose(kernels.pairs(term, left, right, machine), np.diag(expected), atol=TOLERANCE)


def test_rows_are_multiplied_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metaql.udfs.slices.BUDGET", 1)
    left, right = torch.arange(12.0).view(4, 3), torch.ones(4, 3)
    assert row_dots(left, right).tolist() == [3, 12, 21, 30]
