"""ELITE's products of per-sample gradients with a direction, against autograd one sample at a time."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaql.errors import QueryError
from metaql.methods.elite import meta_gradients
from metaql.methods.elite.backward_twice import along_backward
from metaql.methods.elite.meta_gradients import how_along, trainable, why_not_factored


def length(module, rows):
    return module(rows).flatten(1).square().sum(1).add(1e-9).sqrt()


def by_autograd(module, score, rows, direction):
    """⟨∇Ω_i, G⟩ of each sample from its own backward pass through the whole batch."""
    parameters = trainable(module)
    found = []
    for value in score(module, rows):
        own = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
        pairs = zip(own, parameters, strict=True)
        found.append(sum((g * direction[name]).sum() for g, name in pairs if g is not None and name in direction))
    return torch.stack(found).detach()


def random_direction(module):
    return {name: torch.randn_like(each) for name, each in trainable(module).items()}


def is_equal(module, rows, score=length):
    direction = random_direction(module)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = by_autograd(module, score, rows, direction)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = meta_gradients(module, score, rows, direction)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))
    return True


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.last = nn.Linear(5, 5), nn.Linear(5, 3, bias=False)

    def forward(self, rows):
        return self.last(torch.tanh(self.one(torch.tanh(self.one(rows)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)
        self.two.weight = self.one.weight

    def forward(self, rows):
        return self.two(torch.relu(F.linear(self.one(rows), self.one.weight)))


Chain = nn.Sequential
FACTORED = {
    "mlp": (lambda: Chain(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3)), (5,)),
    "no affine": (lambda: Chain(nn.Linear(5, 6, bias=False), nn.LayerNorm(6, elementwise_affine=False)), (5,)),
    "positions": (lambda: Chain(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (6, 5)),
    "conv1d": (lambda: Chain(nn.Conv1d(2, 6, 3, 2, 1), nn.GroupNorm(3, 6), nn.ReLU(), nn.Conv1d(6, 4, 3)), (2, 15)),
    "conv2d": (lambda: Chain(nn.Conv2d(2, 4, 3, padding="same"), nn.ELU(), nn.Conv2d(4, 4, 3, groups=2)), (2, 7, 6)),
    "dilated": (lambda: Chain(nn.Conv2d(1, 4, 3, dilation=2), nn.MaxPool2d(2), nn.Conv2d(4, 2, 2)), (1, 9, 8)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular"), (2, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, bias=False), (1, 3, 4, 3)),
    "transposed": (
        lambda: Chain(nn.ConvTranspose2d(2, 4, 3, 2, 1, 1, groups=2), nn.ReLU(True), nn.Conv2d(4, 1, 3)),
        (2, 4, 5),
    ),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 2, 4, 2, dilation=2), (3, 6)),
    "batch norm that is fixed": (lambda: Chain(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval(), (1, 5, 5)),
    "twice": (Twice, (5,)),
    "tied": (Tied, (5,)),
}  # fmt: skip


@pytest.mark.parametrize("name", FACTORED)
def test_factors_give_what_autograd_gives(name):
    torch.manual_seed(0)
    build, shape = FACTORED[name]
    module = build().double()
    rows = torch.randn(6, *shape, dtype=torch.float64)
    assert why_not_factored(module, length, rows) is None
    assert is_equal(module, rows)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(3, 4, batch_first=True)

    def forward(self, rows):
        return self.recurrent(rows)[0][:, -1]


class Looked(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(9, 4), nn.Linear(4, 2)

    def forward(self, rows):
        return self.last(self.table((rows.abs() * 4).long().clamp(max=8)).mean(1))


class Free(nn.Module):
    """Parameters used in ways that have no factors here: transposed, element-wise, beside the input."""

    def __init__(self):
        super().__init__()
        self.weight, self.scale = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def forward(self, rows):
        return (self.attention(rows, rows, rows, need_weights=False)[0] @ self.weight) * self.scale.exp()


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, rows):
        points = self.layer(rows)
        return points - points.mean(0) / 2


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 4)

    def forward(self, rows):
        rows = rows + 0
        points = self.layer(rows)
        rows.mul_(2)
        return points


FORWARD = {
    "batch norm": (lambda: Chain(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 2)), (1, 6, 6)),
    "batch norm without parameters": (lambda: Chain(nn.Linear(5, 4), nn.BatchNorm1d(4, affine=False)), (5,)),
    "lstm": (Recurrent, (5, 3)),
    "embedding": (Looked, (4,)),
    "free": (Free, (4, 5)),
    "mixing": (Mixing, (5,)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARD)
def test_forward_mode_gives_what_autograd_gives(name):
    torch.manual_seed(0)
    build, shape = FORWARD[name]
    module = build().double()
    rows = torch.randn(6, *shape, dtype=torch.float64)
    assert why_not_factored(module, length, rows) is not None
    assert is_equal(module, rows)


def test_an_lstm_in_single_precision_goes_without_mkldnn():
    torch.manual_seed(0)
    module = Recurrent()
    rows, direction = torch.randn(6, 5, 3), random_direction(module)
    expected = by_autograd(module, length, rows, direction)
    torch.testing.assert_close(meta_gradients(module, length, rows, direction), expected, rtol=1e-5, atol=1e-5)
    assert torch.backends.mkldnn.enabled


def test_neither_way_is_refused():
    bag = nn.EmbeddingBag(9, 4)
    score = lambda module, rows: module((rows.abs() * 4).long().clamp(max=8)).square().sum(1)  # noqa: E731
    with pytest.raises(QueryError, match="EmbeddingBag can't be had"):
        meta_gradients(bag, score, torch.randn(5, 3), random_direction(bag))


class WithoutGradient(nn.Module):
    """Whose mean torch is told to leave out of gradients, and a parameter without factors."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(5, 4), nn.Parameter(torch.randn(4))

    def forward(self, rows):
        points = self.layer(rows) * self.scale
        with torch.no_grad():
            mean = points.mean(0)
        return points - mean


class Held(nn.Module):
    """Which has hold of a view of a parameter, beside the parameter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5).double()
        self.view = self.layer.weight.T

    def forward(self, rows):
        return F.linear(torch.tanh(self.layer(rows)), self.view)


BACKWARD = {
    "no_grad": (WithoutGradient, (5,)),
    "held": (Held, (5,)),
    "weight norm": (lambda: Chain(nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh()), (5,)),
}


@pytest.mark.parametrize("name", BACKWARD)
def test_two_backward_passes_where_forward_mode_is_wrong_or_missing(name):
    torch.manual_seed(0)
    build, shape = BACKWARD[name]
    module = build().double()
    rows = torch.randn(6, *shape, dtype=torch.float64)
    assert how_along(module, length, rows) is along_backward
    assert is_equal(module, rows)


def test_gradients_may_be_switched_off_around():
    module = FORWARD["lstm"][0]().double()
    rows = torch.randn(6, 5, 3, dtype=torch.float64)
    with torch.no_grad():
        assert len(meta_gradients(module, length, rows, random_direction(module))) == 6
