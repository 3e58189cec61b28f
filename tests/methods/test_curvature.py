"""K-FAC, EK-FAC and the diagonal of the Fisher matrix, against the same matrices written out and inverted."""

import pytest
import torch

from metaql.errors import NotFiniteError, QueryError
from metaql.methods.curvature import LayerCurvature
from metaql.methods.kronecker import Squares, basis
from metaql.methods.moments import Moments
from tests.methods.dense import coordinates, gradients, inverse_product, kronecker

# Samples, positions of each, groups, a group's inputs and outputs, bias.
LAYERS = {
    "linear": (30, 1, 1, 4, 3, True),
    "linear without bias": (30, 1, 1, 4, 3, False),
    "linear in sentences": (30, 5, 1, 3, 2, True),
    "grouped": (30, 4, 3, 2, 2, True),
    "fewer samples than parameters": (2, 1, 1, 5, 4, True),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    n, s, g, i, o, bias = LAYERS[request.param]
    torch.manual_seed(0)
    suffix = torch.randn(n, s, g * i, dtype=torch.float64) + 0.5
    prefix = torch.randn(n, s, g * o, dtype=torch.float64) * torch.linspace(0.1, 2, g * o, dtype=torch.float64)
    return suffix, prefix, g, bias


def moments_of(suffix, prefix, groups, bias):
    total, second = Moments(groups, bias), Moments(groups, bias)
    half = len(suffix) // 2
    total.add(suffix[:half], prefix[:half])
    second.add(suffix[half:], prefix[half:])
    total.merge(second)
    return total


def squares_of(suffix, prefix, groups, bias, found):
    total, second = Squares(groups, bias, found), Squares(groups, bias, found)
    half = len(suffix) // 2
    total.add(suffix[:half], prefix[:half])
    second.add(suffix[half:], prefix[half:])
    total.merge(second)
    return total


def written_out(suffix, prefix, groups, bias):
    """A, S of each group, and the places of their products, by loops."""
    n, s = suffix.shape[:2]
    ones = suffix.new_ones(n * s, 1)
    inputs = [torch.cat([a, ones], 1) if bias else a for a in suffix.flatten(0, 1).chunk(groups, 1)]
    outputs = prefix.flatten(0, 1).chunk(groups, 1)
    a = [sum(torch.outer(row, row) for row in own) / (n * s) for own in inputs]
    b = [sum(torch.outer(row, row) for row in own) / n for own in outputs]
    return a, b, coordinates(groups, len(b[0]), len(a[0]) - bias, bias)


def test_kfac_is_the_inverse_of_the_kronecker_product(layer):
    bias = layer[3]
    a, b, places = written_out(*layer)
    found = basis(moments_of(*layer), "fc", torch.float64)
    vector = torch.randn(2, len(places), dtype=torch.float64)
    curvature = LayerCurvature(found.eigenvalues, found, bias)
    matrix = kronecker(b, a, places)
    for damping in (None, 0.3):
        added = damping or 0.1 * matrix.trace() / len(places)
        torch.testing.assert_close(curvature.damping(damping), float(added))
        expected = inverse_product(matrix, added, vector.T).T
        torch.testing.assert_close(curvature.precondition(vector, damping), expected, rtol=1e-9, atol=1e-12)


def test_ekfac_has_the_fisher_matrix_own_diagonal_in_that_basis(layer):
    suffix, prefix, groups, bias = layer
    found = basis(moments_of(*layer), "fc", torch.float64)
    _, _, places = written_out(*layer)
    rotation = kronecker(found.outputs, found.inputs, places)
    rows = gradients(*layer)
    fisher = rows.T @ rows / len(rows)
    diagonal = torch.diag(rotation.T @ fisher @ rotation)
    matrix = rotation @ torch.diag(diagonal) @ rotation.T
    squares = squares_of(suffix, prefix, groups, bias, found)
    curvature = LayerCurvature(squares.mean, found, bias)
    vector = torch.randn(len(places), dtype=torch.float64)
    for damping in (None, 0.3):
        expected = inverse_product(matrix, damping or 0.1 * diagonal.mean(), vector)
        torch.testing.assert_close(curvature.precondition(vector, damping), expected, rtol=1e-9, atol=1e-12)


def test_ekfac_with_every_gradient_s_own_direction_is_the_fisher_matrix():
    # Of one sample with one position the basis holds its gradient, and nothing is approximated.
    suffix, prefix = torch.randn(1, 1, 3, dtype=torch.float64), torch.randn(1, 1, 2, dtype=torch.float64)
    found = basis(moments_of(suffix, prefix, 1, True), "fc", torch.float64)
    (row,) = gradients(suffix, prefix, 1, True)
    vector = torch.randn(len(row), dtype=torch.float64)
    got = LayerCurvature(squares_of(suffix, prefix, 1, True, found).mean, found, True).precondition(vector, 0.1)
    torch.testing.assert_close(got, inverse_product(torch.outer(row, row), 0.1, vector))


def test_diagonal_is_that_of_the_fisher_matrix(layer):
    suffix, prefix, groups, bias = layer
    rows = gradients(*layer)
    curvature = LayerCurvature(squares_of(suffix, prefix, groups, bias, None).mean, None, bias)
    vector = torch.randn(rows.shape[1], dtype=torch.float64)
    diagonal = rows.square().mean(0)
    torch.testing.assert_close(curvature.precondition(vector), vector / (diagonal + 0.1 * diagonal.mean()))


def test_float32_agrees_with_float64(layer):
    suffix, prefix, groups, bias = layer
    vector = torch.randn(gradients(*layer).shape[1], dtype=torch.float64)
    results = []
    for dtype in (torch.float32, torch.float64):
        a, b = suffix.to(dtype), prefix.to(dtype)
        found = basis(moments_of(a, b, groups, bias), "fc", dtype)
        squares = squares_of(a, b, groups, bias, found)
        results.append(LayerCurvature(squares.mean, found, bias).precondition(vector.to(dtype)))
    assert results[0].dtype == torch.float32
    torch.testing.assert_close(results[0].double(), results[1], rtol=1e-3, atol=1e-4)


def test_gradients_too_small_for_their_squares_in_float32():
    torch.manual_seed(0)
    suffix, prefix = torch.randn(20, 1, 3), 1e-22 * torch.randn(20, 1, 2)
    large, small = [], []
    for results, scale in ((large, 1e22), (small, 1.0)):
        found = basis(moments_of(suffix.double(), (prefix * scale).double(), 1, True), "fc")
        squares = squares_of(suffix.double(), (prefix * scale).double(), 1, True, found)
        gradient = (gradients(suffix, prefix, 1, True)[0] * scale).float()
        results.append(LayerCurvature(squares.mean, found, True).precondition(gradient))
    assert bool(torch.isfinite(small[0]).all())
    torch.testing.assert_close(small[0] * 1e-22, large[0], rtol=1e-3, atol=1e-5)


def test_a_layer_without_any_gradient_stays_zero():
    suffix, prefix = torch.randn(4, 1, 3, dtype=torch.float64), torch.zeros(4, 1, 2, dtype=torch.float64)
    found = basis(moments_of(suffix, prefix, 1, True), "fc", torch.float64)
    curvature = LayerCurvature(found.eigenvalues, found, True)
    vector = torch.randn(8, dtype=torch.float64)
    assert curvature.precondition(vector).tolist() == [0.0] * 8
    torch.testing.assert_close(curvature.precondition(vector, 0.5), vector / 0.5)


def test_no_positions_have_no_basis():
    total = Moments(1, True)
    assert basis(total, "fc") is None
    total.add(torch.zeros(3, 0, 4), torch.zeros(3, 0, 2))
    squares = Squares(1, True, None)
    squares.add(torch.zeros(3, 0, 4), torch.zeros(3, 0, 2))
    assert (total.samples, total.positions, squares.samples, squares.mean) == (3, 0, 3, None)


def test_moments_that_are_not_finite_name_the_layer():
    total = Moments(1, False)
    total.add(torch.full((2, 1, 3), 1e30), torch.ones(2, 1, 2))
    with pytest.raises(NotFiniteError, match=r"inputs of layer 'features[.]3' are NaN or infinite"):
        basis(total, "features.3")


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan"), float("inf")])
def test_damping_has_to_be_positive(damping):
    curvature = LayerCurvature(torch.ones(1, 2, 3, dtype=torch.float64), None, False)
    with pytest.raises(QueryError, match="is not a positive number"):
        curvature.precondition(torch.ones(6), damping)
