"""docs/layers.md, row by row: each way of using a parameter is recorded as the table says, and exactly."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import metaql
from metaql import errors
from metaql.storage.recording.layering import FACTORED_KINDS
from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.plan import CAPTURED, UNUSED
from metaql.storage.recording.sample_gradients import SampleGradients
from metaql.storage.store import Store
from tests.models.loop import by_loop, classified
from tests.recording.reference import assert_close, gradients_of_rows, split_by_parameter
from tests.recording.using import Using, numbers

PAGE = Path(__file__).parents[2] / "docs" / "layers.md"
SAMPLES = 5
VECTORS, MAPS = (SAMPLES, 3, 4), (SAMPLES, 4, 5)


def words():
    return torch.randint(1, 7, (SAMPLES, 6))


def given(body):
    """A model that is a module alone."""
    model = Using(lambda model, x: model.body(x))
    model.body = body
    return model


class Attention(nn.Module):
    """Queries from x, keys and values from what comes after."""

    def __init__(self, width=4, **options):
        super().__init__()
        self.width = width
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x):
        other = torch.tanh(x[:, 1:, : self.width])
        return self.attention(x, other, other)[0]


class First(nn.Module):
    """The first of what a module returns."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x)[0]


class SelfAttention(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        return x * 2 + p

    @staticmethod
    def backward(ctx, dy):
        return dy * 2, dy.sum((0, 1))


def beside(*functions):
    """The results of several functions of the same parameters, side by side."""
    return lambda model, x: torch.cat([function(model, x).flatten(1) for function in functions], 1)


# row => its models, made when they are needed
KINDS = {
    "`nn.Linear`, `F.linear`": lambda: [given(nn.Linear(4, 3))],
    "`x @ W`, `torch.mm`, `torch.addmm`": lambda: [
        Using(beside(lambda m, x: x @ m.w, lambda m, x: torch.mm(x[:, 0], m.w)), w=numbers(4, 3)),
        Using(lambda m, x: torch.addmm(m.b, x[:, 0], m.w), w=numbers(4, 3), b=numbers(3)),
    ],
    "a transposed weight, `W.T`": lambda: [Using(lambda m, x: F.linear(x, m.w.T) @ m.w.t(), w=numbers(4, 3))],
    "a part of a weight, `W[:k]`, `chunk`, `split`": lambda: [
        Using(
            beside(
                lambda m, x: F.linear(x, m.w[:2]),
                lambda m, x: F.linear(x, m.w.chunk(3)[1]),
                lambda m, x: x @ m.w.split([2, 4])[1].T,
            ),
            w=numbers(6, 4),
        )
    ],
    "`W @ x`": lambda: [Using(lambda m, x: m.w @ x, w=numbers(2, 3))],
    "`nn.MultiheadAttention`, self": lambda: [given(SelfAttention())],
    "`nn.MultiheadAttention`, cross": lambda: [given(Attention())],
    "`nn.MultiheadAttention` with `kdim` and `vdim`": lambda: [given(Attention(2, kdim=2, vdim=2))],
    "`bias_k` and `bias_v` of attention": lambda: [given(SelfAttention(add_bias_kv=True))],
    "`nn.Conv1d`, `2d`, `3d`": lambda: [given(nn.Conv1d(4, 2, 3))],
    "`nn.ConvTranspose1d`, `2d`, `3d`": lambda: [given(nn.ConvTranspose1d(4, 2, 3))],
    "`nn.Embedding`": lambda: [
        given(nn.Embedding(7, 3, **options)) for options in ({"padding_idx": 2}, {"sparse": True}, {"max_norm": 1.0})
    ],
    "an embedding of positions": lambda: [
        Using(lambda m, x: x.unsqueeze(-1) * 0.1 + F.embedding(torch.arange(6), m.w), w=numbers(8, 3)),
        Using(lambda m, x: x.unsqueeze(-1) * 0.1 + F.embedding(torch.arange(6)[None], m.w), w=numbers(8, 3)),
    ],
    "`nn.EmbeddingBag`, sum and mean": lambda: [given(nn.EmbeddingBag(7, 3, mode=mode)) for mode in ("sum", "mean")],
    "`nn.EmbeddingBag`, max": lambda: [given(nn.EmbeddingBag(7, 3, mode="max"))],
    "`scale_grad_by_freq`": lambda: [given(nn.Embedding(7, 3, scale_grad_by_freq=True))],
    "layer, RMS, group and instance norm": lambda: [
        given(each) for each in (nn.LayerNorm(5), nn.RMSNorm(5), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4, affine=True))
    ],
    "batch norm in evaluation mode": lambda: [given(nn.BatchNorm1d(4))],
    "`x + p`, `x - p`": lambda: [
        Using(lambda m, x: torch.tanh(x + m.p) - m.p[:, :1], p=numbers(1, 3, 4)),
        Using(lambda m, x: x - m.p, p=numbers(4)),
    ],
    "`x * p`, `x / p`": lambda: [Using(lambda m, x: x * m.p / m.q, p=numbers(4), q=numbers().abs() + 1)],
    "`p.expand`, `p.repeat` for each sample": lambda: [
        Using(lambda m, x: torch.cat([m.p.expand(len(x), -1, -1), x], 1).cos(), p=numbers(1, 1, 4)),
        Using(lambda m, x: torch.cat([m.p.repeat(len(x), 1, 1), x], 1).cos(), p=numbers(2, 4)),
    ],
    "`nn.PReLU`": lambda: [given(nn.PReLU()), given(nn.PReLU(4))],
    "`x @ v` with a vector": lambda: [Using(lambda m, x: x @ m.v, v=numbers(4))],
    "`x.mul_(p)`": lambda: [Using(lambda m, x: torch.sin(x).mul_(m.p), p=numbers(4))],
    "a function of `p` alone, `p.exp()`": lambda: [
        Using(lambda m, x: x * m.p.exp(), p=numbers(4)),
        Using(lambda m, x: x * (1 - m.p), p=numbers(4)),
    ],
    "`p + 1`, `p.float()`": lambda: [
        Using(lambda m, x: x * (1 + m.p), p=numbers(4)),
        Using(lambda m, x: F.rms_norm(x, (4,), m.p.to(x.dtype) + 1) + (m.q - 0.5), p=numbers(4), q=numbers(4)),
    ],
    "rows of `p` by index, `p[i]`": lambda: [Using(lambda m, x: m.p[x], p=numbers(7, 3))],
    "`nn.LSTM`, `nn.GRU`, `nn.RNN`": lambda: [
        given(First(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True))),
        given(First(nn.LSTM(4, 3, proj_size=2, batch_first=True))),
        given(First(nn.GRU(4, 3, batch_first=True))),
        given(First(nn.RNN(4, 3, batch_first=True))),
    ],
    "`nn.LSTMCell`, `nn.GRUCell`": lambda: [given(First(nn.LSTMCell(4, 3))), given(nn.GRUCell(4, 3))],
    "weight norm": lambda: [
        given(nn.utils.weight_norm(nn.Linear(4, 3))),
        given(parametrizations.weight_norm(nn.Linear(4, 3))),
    ],
    "spectral norm": lambda: [
        given(nn.utils.spectral_norm(nn.Linear(4, 3))),
        given(parametrizations.spectral_norm(nn.Linear(4, 3))),
    ],
    "`nn.Bilinear`, `torch.einsum`": lambda: [
        Using(lambda m, x: torch.einsum("nsi,io->nso", x, m.w), w=numbers(4, 3)),
        Using(lambda m, x: F.bilinear(x, x, m.w), w=numbers(2, 4, 4)),
    ],
    "a function of your own": lambda: [Using(lambda m, x: Doubling.apply(x, m.p), p=numbers(4))],
    "a parameter that nothing uses": lambda: [
        Using(lambda m, x: F.linear(x, m.w.detach(), m.b), w=numbers(3, 4), b=numbers(3))
    ],
}
OF_WORDS = ("mbedding", "freq", "p[i]")
OF_MAPS = ("Conv", "norm", "PReLU")


def inputs_of(row):
    if any(each in row for each in OF_WORDS):
        return words()
    if "Cell" in row:
        return numbers(SAMPLES, 4)
    reparametrised = "weight norm" in row or "spectral norm" in row
    return numbers(*(MAPS if any(each in row for each in OF_MAPS) and not reparametrised else VECTORS))


def table():
    """(row, collect, step) for each row of the page's table."""
    lines = [line.removeprefix("| ") for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    return [tuple(cell.strip() for cell in line.split(" | ")[:3]) for line in lines]


by_row = pytest.mark.parametrize("row, collect, step", table(), ids=[row for row, *_ in table()])


def about(model, row):
    """The names of the parameters that a row is about: where there are matrices, not the biases beside them."""
    if row.startswith("`bias_k`"):
        return {name for name, _ in model.named_parameters() if "bias_" in name}
    matrices = {name for name, each in model.named_parameters() if each.dim() > 1}
    return matrices or {name for name, _ in model.named_parameters()}


def way_of(layers, row, model):
    kinds = {layer.kind for layer in layers if layer.parameters[0].name in about(model, row)}
    return "factors" if kinds <= set(FACTORED_KINDS) else "full"


def test_every_row_is_tested():
    assert [row for row, *_ in table()] == list(KINDS)


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one", "ignore::FutureWarning")
@by_row
def test_collected(row, collect, step):
    for model in KINDS[row]():
        model = model.double().eval()
        batch = (inputs_of(row), torch.arange(SAMPLES) % 3)
        source = SampleGradients(ModelLosses(model, None), dict(model.named_parameters()), "float64")
        if collect == "refused":
            with pytest.raises(errors.MetaQLError):
                source.of(batch, np.arange(SAMPLES))
            continue
        blocks = source.of(batch, np.arange(SAMPLES)).blocks
        assert_close(split_by_parameter(source.layers, blocks), by_loop(model, batch, SAMPLES, classified), 1e-9)
        (plan,) = source._plans.values()
        again = {name for name in about(model, row) if plan.routes[name] not in (CAPTURED, UNUSED)}
        assert (f"again {again}" if again else way_of(source.layers, row, model)).startswith(collect)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@by_row
def test_stepped(row, collect, step, tmp_path):
    for number, model in enumerate(KINDS[row]()):
        model = model.double().eval()
        batch = (inputs_of(row), torch.arange(SAMPLES) % 3)
        expected = by_loop(model, batch, SAMPLES, classified)
        recorder = metaql.Recorder(model, tmp_path / str(number), dtype="float64")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def run(recorder=recorder, model=model, batch=batch, optimizer=optimizer):
            with recorder, recorder.step(range(SAMPLES), optimizer):
                F.cross_entropy(model(batch[0]), batch[1]).backward()

        if step == "refused":
            with pytest.raises((errors.UnsupportedParameterError, errors.SampleIdError)):
                run()
            continue
        run()
        store = Store.open(tmp_path / str(number))
        assert_close(gradients_of_rows(store, np.arange(SAMPLES)), expected, 1e-9)
        assert way_of(store.layers, row, model) == step
