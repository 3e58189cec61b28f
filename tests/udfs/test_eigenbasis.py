"""Products with preconditioned gradients in the curvature's eigenbasis, against the inverse laid out."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from metaql.methods.curvature import LayerCurvature
from metaql.methods.eigenbasis import eigenbasis
from metaql.methods.kronecker import Basis
from metaql.storage.blocks import Block
from metaql.storage.schema import Layer
from metaql.udfs.costs import CONTRACT, FULL, GRAM, Constants
from metaql.udfs.eigenbasis import InEigenbasis, split
from metaql.udfs.patterns import Term
from metaql.udfs.slices import move

MACHINES = [Constants(), *(Constants(forced=frozenset({way})) for way in (GRAM, CONTRACT, FULL))]
# A tenth of the mean eigenvalue; so small that all is felt but what is zero; so large that nothing is.
DAMPINGS = [None, 1e-9, 1e20]


def curvature_of(rng: np.random.Generator, layer: Layer, dead: bool) -> LayerCurvature:
    """Random eigenvectors and eigenvalues; of dead inputs and outputs the latter are zero."""
    o, i = layer.parameters[0].shape[0], (layer.input_width or 0) + layer.has_bias
    vectors = [np.linalg.qr(rng.standard_normal((size, size)))[0] for size in (i, o)]
    values = rng.exponential(size=(o, i)) * np.outer(*(10.0 ** rng.uniform(-4, 1, size) for size in (o, i)))
    if dead:
        values[rng.random(o) < 0.4], values[:, rng.random(i) < 0.4] = 0.0, 0.0
    inputs, outputs = (torch.from_numpy(one).unsqueeze(0) for one in vectors)
    basis = Basis(inputs, outputs, torch.ones(1, i), torch.ones(1, o))
    return LayerCurvature(torch.from_numpy(values).unsqueeze(0), basis, layer.has_bias)


def found_of(term: Term, curvature: LayerCurvature, damping: float | None) -> InEigenbasis:
    found = split(term, curvature, damping, None)  # type: ignore[arg-type]
    assert found is not None
    return found


def scores(found: InEigenbasis, left: Block, right: Block, machine: Constants) -> Any:
    session: Any = SimpleNamespace(costs=machine)
    ours, theirs = found.turned(left), found.preconditioned_block(right)
    halves = slice(0, 3), slice(3, right.samples)
    return np.hstack([found.products(session, ours, theirs, part) for part in halves])


@pytest.mark.parametrize("form", ["fixed", "ragged"])
@pytest.mark.parametrize("right_form", ["fixed", "ragged", "full"])
@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_the_inverse_laid_out(
    form: str, right_form: str, dead: bool, seed: int, plain: SimpleNamespace, draw: SimpleNamespace
) -> None:
    rng = np.random.default_rng(seed)
    layer = draw.layer(rng, "linear")
    curvature = curvature_of(rng, layer, dead)
    left, right = draw.block(rng, layer, 5, form), draw.block(rng, layer, 7, right_form)
    g, h = plain.gradients(layer, left), plain.gradients(layer, right)
    for places in [(0,), (1,), (0, 1)] if layer.has_bias else [(0,)]:
        term = Term(layer, layer, tuple((place, place) for place in places))
        for damping in DAMPINGS:
            inverted = curvature.precondition(torch.from_numpy(h), damping).numpy()
            expected = (g * plain.selected(layer, places)) @ inverted.T
            found = found_of(term, curvature, damping)
            scale = np.abs(expected).max()
            for machine in MACHINES:
                np.testing.assert_allclose(scores(found, left, right, machine), expected, rtol=1e-9, atol=1e-10 * scale)


def test_only_what_is_felt_is_laid_out(draw: SimpleNamespace) -> None:
    rng = np.random.default_rng(0)
    layer = draw.layer(rng, "linear")
    values = torch.zeros(1, 6, 4, dtype=torch.float64)
    values[0, 1, 2] = values[0, 4, 2] = values[0, 4, 0] = 1.0
    values[0, 5, 3] = 1e-9
    eye = [torch.eye(size, dtype=torch.float64).unsqueeze(0) for size in (4, 6)]
    curvature = LayerCurvature(values, Basis(*eye, torch.ones(1, 4), torch.ones(1, 6)), False)
    found = eigenbasis(curvature, 0.5, 1e-7)
    assert found is not None
    torch.testing.assert_close(found.felt, 1 / (values[0][[1, 4]][:, [0, 2]] + 0.5))
    assert found.flat == 2.0
    exact = eigenbasis(curvature, 0.5, 1e-12)
    assert exact is not None
    assert tuple(exact.felt.shape) == (3, 3)
    weight = type(layer.parameters[0])("fc.weight", (6, 4))
    wide = type(layer)("fc", "linear", (weight,), "factored", "float32", 1, 4, 6)
    pieces = found_of(Term(wide, wide, ((0, 0),)), curvature, 0.5).pieces
    assert [(piece.felt, piece.layer.parameters[0].shape) for piece in pieces] == [
        (True, (2, 2)),
        (False, (6, 2)),
        (False, (4, 2)),
    ]


def test_float32_keeps_its_accuracy(plain: SimpleNamespace, draw: SimpleNamespace) -> None:
    """Also where the inverse of an eigenvalue is more than it holds."""
    rng = np.random.default_rng(5)
    layer = draw.layer(rng, "linear")
    curvature = curvature_of(rng, layer, dead=True)
    left, right = draw.block(rng, layer, 5, "fixed"), draw.block(rng, layer, 7, "fixed")
    term = Term(layer, layer, ((0, 0),))
    g, h = plain.gradients(layer, left) * plain.selected(layer, (0,)), plain.gradients(layer, right)
    single = [move(one, torch.device("cpu"), torch.float32) for one in (left, right)]
    for small in (1.0, 1e-40):
        scaled = LayerCurvature(curvature.eigenvalues * small, curvature.basis, curvature.bias)
        expected = g @ scaled.precondition(torch.from_numpy(h)).numpy().T * small
        theirs = replace(single[1], prefix=single[1].prefix * small)
        found = scores(found_of(term, scaled, None), single[0], theirs, Constants())
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_no_eigenbasis_of_groups_nor_of_parameters() -> None:
    values, eye = torch.ones(2, 1, 1, dtype=torch.float64), torch.ones(2, 1, 1)
    assert eigenbasis(LayerCurvature(values, Basis(eye, eye, eye[0], eye[0]), False), None, 1e-7) is None
    assert eigenbasis(LayerCurvature(values[:1], None, False), None, 1e-7) is None


def test_without_any_gradient_all_is_zero() -> None:
    eye = torch.eye(2).unsqueeze(0)
    curvature = LayerCurvature(torch.zeros(1, 2, 2, dtype=torch.float64), Basis(eye, eye, eye[0], eye[0]), False)
    found = eigenbasis(curvature, None, 1e-7)
    assert found is not None
    assert found.flat == 0.0
    assert found.felt.numel() == 0
