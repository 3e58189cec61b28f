"""Products with a Hessian, and the solvers on them, against the matrix written out."""

import pytest
import torch
from torch.nn import functional as F

from metaql.errors import QueryError
from metaql.methods.hessian import Hessian
from metaql.methods.solvers import arnoldi, cg, eigenpairs, lissa
from tests.methods.dense import inverse_product


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make(hidden, batches=2):
    """The Hessian of a network (of logistic regression for ``hidden`` None), and the same matrix written out."""
    widths = (4, 3) if hidden is None else (4, hidden, 3)
    shapes = {f"w{k}": shape for k, shape in enumerate(zip(widths[1:], widths[:-1], strict=True))}
    parameters = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    parameters["unused"] = torch.randn(2, dtype=torch.float64)
    data = [(torch.randn(5 + 3 * k, 4, dtype=torch.float64), torch.randint(3, (5 + 3 * k,))) for k in range(batches)]

    def losses(values, batch):
        inputs, targets = batch
        for name in list(shapes)[:-1]:
            inputs = torch.tanh(inputs @ values[name].T)
        return F.cross_entropy(inputs @ values[list(shapes)[-1]].T, targets, reduction="none")

    flat = torch.cat([each.flatten() for each in parameters.values()])

    def mean(vector):
        values = dict(zip(parameters, vector.split([each.numel() for each in parameters.values()]), strict=True))
        shaped = {name: values[name].reshape(each.shape) for name, each in parameters.items()}
        return torch.cat([losses(shaped, batch) for batch in data]).mean()

    return Hessian(losses, parameters, data), torch.autograd.functional.hessian(mean, flat)


@pytest.mark.parametrize("hidden", [None, 5])
def test_products_are_those_with_the_matrix(hidden):
    hessian, matrix = make(hidden)
    vector = torch.randn(hessian.width, dtype=torch.float64)
    torch.testing.assert_close(hessian.times(vector), matrix @ vector)
    weighted = (5 * hessian.times_batch(0, vector) + 8 * hessian.times_batch(1, vector)) / 13
    torch.testing.assert_close(weighted, matrix @ vector)


def test_solvers_invert_a_convex_loss():
    hessian, matrix = make(None, batches=1)
    vector = torch.randn(hessian.width, dtype=torch.float64)
    expected = inverse_product(matrix, 0.05, vector)
    torch.testing.assert_close(cg(hessian, vector, 0.05), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lissa(hessian, vector, 0.05), expected, rtol=1e-4, atol=1e-4)
    outside = torch.cat([vector[:-2], torch.zeros(2, dtype=torch.float64)])
    expected = inverse_product(matrix, 0.05, outside)
    # Logits may move together without a change of the loss: 4 directions of the 12 have no curvature.
    within = matrix @ torch.linalg.pinv(matrix, rtol=1e-9) @ expected
    torch.testing.assert_close(arnoldi(hessian, matrix @ outside, 0.05), matrix @ within, rtol=1e-6, atol=1e-8)


def test_lissa_comes_near_from_single_batches():
    hessian, matrix = make(None, batches=4)
    vector = matrix @ torch.randn(hessian.width, dtype=torch.float64)
    expected = inverse_product(matrix, 0.2, vector)
    got = lissa(hessian, vector, 0.2, steps=2000)
    assert float((got - expected).norm() / expected.norm()) < 0.02


def test_arnoldi_of_low_rank_keeps_the_largest():
    hessian, matrix = make(5)
    vector = torch.randn(hessian.width, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(matrix)
    largest = vectors[:, -3:]
    expected = largest @ ((largest.T @ vector) / (values[-3:] + 0.1))
    pairs = eigenpairs(hessian, hessian.width, torch.float64, rank=3)
    torch.testing.assert_close(arnoldi(hessian, vector, 0.1, pairs), expected, rtol=1e-5, atol=1e-8)


def test_a_hessian_that_is_not_positive():
    hessian, matrix = make(5)
    lowest, vectors = torch.linalg.eigh(matrix)
    assert lowest[0] < -1e-3
    with pytest.raises(QueryError, match="'cg' needs a Hessian that is positive definite with its damping of 1e-06"):
        cg(hessian, vectors[:, 0], 1e-6)
    with pytest.raises(QueryError, match="'lissa' diverges"):
        lissa(hessian, vectors[:, 0], 1e-6)
    assert bool(torch.isfinite(arnoldi(hessian, vectors[:, 0], 1e-6)).all())


def test_too_few_steps():
    hessian, _ = make(None)
    with pytest.raises(QueryError, match="'cg' has not converged in 2 steps"):
        cg(hessian, torch.randn(hessian.width, dtype=torch.float64), 0.01, steps=2)


@pytest.mark.parametrize("solve", [cg, lissa, arnoldi])
def test_damping_has_to_be_positive(solve):
    hessian, _ = make(None)
    with pytest.raises(QueryError, match="is not a positive number"):
        solve(hessian, torch.ones(hessian.width, dtype=torch.float64), 0.0)


class OnceOnly(torch.autograd.Function):
    """A square with no second derivative."""

    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def aligned(values):
    """A loss of torch's own that has a first derivative only."""
    chances = values.reshape(2, 1, 3).log_softmax(-1)
    return F.ctc_loss(chances, torch.tensor([[1]]), (2,), (1,), reduction="none")


@pytest.mark.parametrize("loss", [OnceOnly.apply, lambda values: OnceOnly.apply(values).square(), aligned])
def test_what_can_t_be_differentiated_twice(loss):
    hessian = Hessian(lambda values, batch: loss(values["w"]), {"w": torch.ones(6)}, [None])
    with pytest.raises(QueryError, match="can't be differentiated twice, which its Hessian takes"):
        hessian.times(torch.ones(6))


def test_zero_stays_zero():
    hessian, _ = make(None, batches=1)
    zero = torch.zeros(hessian.width, dtype=torch.float64)
    for solve in (cg, lissa, arnoldi):
        assert solve(hessian, zero, 0.1).tolist() == zero.tolist()


class Unequal:
    """The mean over one sample whose Hessian is zero and 99 whose Hessian is one."""

    sizes = (1, 99)

    def times(self, vector):
        return 0.99 * vector

    def times_batch(self, number, vector):
        return number * vector


def test_lissa_counts_batches_by_their_samples():
    vector = torch.ones(2, dtype=torch.float64)
    torch.testing.assert_close(lissa(Unequal(), vector, 0.1), vector / 1.09, rtol=0.01, atol=0)
