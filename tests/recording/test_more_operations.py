"""Operations on matrices the other way round, on parts of parameters, and element by element, over random shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.recording.reference import by_loop
from tests.recording.using import Using, captured, numbers, using_module

few = settings(max_examples=40, deadline=None, derandomize=True)


PRODUCTS = {
    "@": lambda m, x: x @ m.w,
    "matmul": lambda m, x: torch.matmul(x, m.w),
    "method": lambda m, x: x.matmul(m.w),
    "mm": lambda m, x: torch.mm(x.flatten(0, -2), m.w).unflatten(0, x.shape[:-1]),
    "addmm": lambda m, x: torch.addmm(m.b, x.flatten(0, -2), m.w).unflatten(0, x.shape[:-1]),
    "t": lambda m, x: F.linear(x, m.w.t(), m.b),
    "T": lambda m, x: F.linear(x, m.w.T),
    "mT": lambda m, x: F.linear(x, m.w.mT),
    "transpose": lambda m, x: F.linear(x, m.w.transpose(0, 1)),
    "twice transposed": lambda m, x: x @ m.w.t().T,
    "beside itself": lambda m, x: torch.tanh(x @ m.w) @ m.w.T + F.linear(x, m.w.T) @ m.w.T + x,
}


@pytest.mark.parametrize("way", PRODUCTS)
@pytest.mark.parametrize(
    "samples, leading, widths", [(1, (), (3, 2)), (4, (), (1, 5)), (5, (3,), (4, 4)), (3, (2, 5), (4, 1))]
)
def test_a_matrix_from_the_right(way, samples, leading, widths):
    model = Using(PRODUCTS[way], w=numbers(*widths))
    if way in ("addmm", "t"):
        model.b = nn.Parameter(numbers(widths[1]))
    layers = captured(model, numbers(samples, *leading, widths[0]), samples)
    assert layers["w"].kind == "linear"


@pytest.mark.parametrize("samples, shape", [(1, (4, 2)), (5, (4, 3)), (3, (2, 4, 5))])
def test_a_matrix_from_the_left(samples, shape):
    layers = captured(Using(lambda m, x: m.w @ x, w=numbers(3, 4)), numbers(samples, *shape), samples)
    assert layers["w"].kind == "linear"


def test_a_matrix_from_the_left_of_samples_in_columns():
    captured(Using(lambda m, x: m.w @ x.T + m.b, axis=1, w=numbers(3, 4), b=numbers(3, 1)), numbers(5, 4), 5)


@pytest.mark.parametrize("leading", [(), (4,), (3, 2)])
def test_a_vector(leading):
    captured(Using(lambda m, x: x @ m.w + F.linear(x, m.w), w=numbers(6)), numbers(5, *leading, 6), 5)


@few
@given(data=st.data())
def test_a_part_of_a_matrix(data):
    """Slices of slices, of the weight and of the bias, and what they leave."""

    def cut(size, name):
        begin = data.draw(st.integers(0, size - 1), name)
        return slice(begin, data.draw(st.integers(begin + 1, size), name), data.draw(st.integers(1, 2), name))

    height, width = data.draw(st.integers(2, 6), "height"), data.draw(st.integers(2, 6), "width")
    rows, columns, again = cut(height, "rows"), cut(width, "columns"), cut(height, "again")
    transposed = data.draw(st.booleans(), "transposed")
    samples = data.draw(st.integers(1, 5), "samples")

    def function(m, x):
        part = m.w[rows][:, columns]
        out = torch.tanh(F.linear(x[..., columns], part, m.b[rows]))
        out = torch.cat([out, F.linear(x, m.w[again], m.c[: len(m.w[again])]), F.linear(x, m.w, m.b)], -1)
        return torch.cat([out, F.linear(out[..., : part.shape[0]], part.t())], -1) if transposed else out

    model = Using(function, w=numbers(height, width), b=numbers(height), c=numbers(height + 1))
    captured(model, numbers(samples, 3, width), samples)


def test_parts_by_chunk_split_unbind_narrow_and_view():
    def function(m, x):
        q, k, v = m.w.chunk(3)
        outs = [F.linear(x, q), F.linear(x, k.narrow(0, 1, 3)), F.linear(x, m.w.split([5, 7])[1]), x @ v]
        outs += [F.linear(x, m.w.unflatten(0, (3, 4)).unbind()[1]), F.linear(x, m.w.view(3, 4, 4)[2].t())]
        return torch.cat(outs, -1)

    layers = captured(Using(function, w=numbers(12, 4)), numbers(5, 2, 4), 5)
    assert layers["w"].kind == "linear"


def test_a_view_made_before_the_forward_pass():
    model = Using(lambda m, x: F.linear(x, m.held[0]) @ m.held[1], w=numbers(6, 6))
    model.held = (model.w[:4], model.w.T[:4])
    expected = numbers(5, 6)

    def loop(model, batch, samples, losses):
        fresh = Using(lambda m, x: F.linear(x, m.w[:4]) @ m.w.T[:4], w=model.w.detach().clone())
        return by_loop(fresh, batch, samples, losses)

    captured(model, expected, 5, loop=loop)


BROADCAST = {
    "+": lambda m, x: x + m.p,
    "p +": lambda m, x: m.p + x,
    "add_": lambda m, x: (x * 2).add_(m.p),
    "-": lambda m, x: x - m.p,
    "p -": lambda m, x: m.p - x,
    "*": lambda m, x: x * m.p,
    "p *": lambda m, x: torch.mul(m.p, x),
    "/": lambda m, x: x / m.p,
    "p /": lambda m, x: m.p / x,
    "all": lambda m, x: torch.tanh(x * m.p + m.p) / m.p - m.p,
}


@few
@given(data=st.data())
def test_element_by_element(data):
    """Every way of broadcasting: missing dimensions, dimensions of one, of the parameter or of the data."""
    draw = data.draw
    samples = draw(st.integers(1, 5), "samples")
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3), "sizes")
    shape = [draw(st.sampled_from([1, size]), "own") for size in sizes]
    shape = shape[draw(st.integers(0, len(shape)), "missing") :]
    if draw(st.booleans(), "whole"):
        shape = [1, *[1] * (len(sizes) - len(shape)), *shape]
    thin = [draw(st.sampled_from([1, size]), "thin") for size in sizes]
    way = BROADCAST[draw(st.sampled_from(sorted(BROADCAST)), "way")]
    inputs = numbers(samples, *(sizes if way is BROADCAST["add_"] else thin)) + 3
    captured(Using(way, p=numbers(*shape).abs() + 1), inputs, samples)


@pytest.mark.parametrize("way", ["+", "*", "/"])
@pytest.mark.parametrize("samples", [5, 4, 8])
def test_element_by_element_with_time_first(way, samples):
    """Positions in the first dimension, where the parameter has its own."""

    def function(m, x):
        return BROADCAST[way](m, torch.tanh(x.transpose(0, 1) * 2))

    captured(Using(function, axis=1, p=numbers(4, 1, 3).abs() + 1), numbers(samples, 4, 3), samples)


def test_parts_element_by_element():
    def function(m, x):
        sums = (x + m.p[:, :4] + m.q[0] * x - m.q.T[:, 1]) / m.q[:1, :1]
        return torch.cat([sums, m.p[:, 2:].expand(len(x), -1, -1)], 1)

    captured(Using(function, p=numbers(1, 6, 3), q=numbers(2, 3).abs() + 1), numbers(5, 4, 3), 5)


@pytest.mark.parametrize("samples", [1, 2, 5])
@pytest.mark.parametrize(
    "copy",
    [
        lambda p, x: p.expand(len(x), -1, -1),
        lambda p, x: p.expand((len(x), 2, 3)),
        lambda p, x: p[0].expand(len(x), 2, 3),
        lambda p, x: p.expand_as(x[:, :2]),
        lambda p, x: torch.broadcast_to(p, (len(x), 2, 3)),
        lambda p, x: p.repeat(len(x), 1, 1),
        lambda p, x: p[0].unsqueeze(0).repeat((len(x), 1, 1)),
    ],
)
def test_a_copy_for_every_sample(copy, samples):
    """And what is looked at of the copies is not a second use of the parameter."""

    def function(m, x):
        copies = copy(m.p, x)
        return torch.cat([copies, x, copies[:, :1] * x, copies.transpose(1, 2)[..., :1].transpose(1, 2) + x], 1)

    captured(Using(function, p=numbers(1, 2, 3)), numbers(samples, 4, 3), samples)


@pytest.mark.parametrize("shape", [(5, 4), (5, 4, 3), (5, 4, 3, 2)])
@pytest.mark.parametrize("slopes", [1, 4])
def test_prelu(shape, slopes):
    captured(Using(lambda m, x: F.prelu(x, m.w), w=numbers(slopes)), numbers(*shape), 5)


def test_a_table_looked_up_for_all_samples_at_once():
    def function(m, x):
        h = F.embedding(x, m.words)
        h = h + F.embedding(torch.arange(x.shape[1]), m.places)
        h = torch.tanh(h + F.embedding(torch.arange(x.shape[1])[None], m.places).to(h.device)) * 2
        return h.add_(F.embedding(torch.tensor([1, 0, 2, 1]), m.places).unsqueeze(0))

    model = Using(function, words=numbers(7, 3), places=numbers(4, 3))
    for samples in (1, 2, 4, 5, 8):
        captured(model, torch.randint(0, 7, (samples, 4)), samples)


def test_a_table_looked_up_for_each_sample_and_broadcast_over_time():
    def function(m, x, y):
        return torch.tanh(x.transpose(0, 1) @ m.w) + F.embedding(y, m.labels)

    model = Using(function, axis=1, labels=numbers(3, 4), w=numbers(4, 4))
    labels = torch.tensor([0, 2, 1, 1, 0])

    def losses(model, batch):
        return F.cross_entropy(model(batch[0], batch[2]), batch[1], reduction="none")

    captured(model, (numbers(5, 6, 4), torch.arange(5) % 3, labels), 5, losses)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data(), dimensions=st.integers(1, 3))
def test_transposed_convolution(data, dimensions):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]), "groups")
    channels = (groups * draw(st.integers(1, 2), "in"), groups * draw(st.integers(1, 3), "out"))

    def each(low, high, name):
        return tuple(draw(st.integers(low, high), name) for _ in range(dimensions))

    kernel, stride, dilation = each(1, 3, "kernel"), each(1, 3, "stride"), each(1, 2, "dilation")
    padding = each(0, 2, "padding")
    extra = tuple(draw(st.integers(0, step - 1), "extra") for step in stride)
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dimensions - 1]
    body = kind(*channels, kernel, stride, padding, extra, groups, draw(st.booleans(), "bias"), dilation)
    samples = draw(st.integers(1, 4), "samples")
    layers = captured(using_module(body), numbers(samples, channels[0], *each(5, 6, "size")), samples)
    assert layers["body"].kind == "conv"


@few
@given(data=st.data())
def test_bags_of_embeddings(data):
    draw = data.draw
    samples, rows = draw(st.integers(1, 6), "samples"), 5
    weighted, last = draw(st.booleans(), "weighted"), draw(st.booleans(), "last")
    mode = "sum" if weighted else draw(st.sampled_from(["sum", "mean"]), "mode")
    padding = draw(st.sampled_from([None, 0, -2]), "padding")
    lengths = draw(st.lists(st.integers(0, 4), min_size=samples, max_size=samples), "lengths")
    indices = torch.randint(0, rows, (sum(lengths),))
    weights = numbers(sum(lengths)) if weighted else None
    ends = torch.tensor(lengths).cumsum(0)
    offsets = torch.cat([ends.new_zeros(1), ends])[: None if last else -1]

    def bags(model, indices, offsets, per_sample_weights):
        options = {"per_sample_weights": per_sample_weights, "include_last_offset": last, "padding_idx": padding}
        return F.embedding_bag(indices, model.w, offsets, mode=mode, **options)

    def losses(model, batch):
        return F.cross_entropy(model(indices, offsets, weights), batch[1], reduction="none")

    def loop(model, batch, samples, _):
        found = []
        for sample in range(samples):
            own = slice(int(ends[sample]) - lengths[sample], int(ends[sample]))
            end = torch.tensor([0, lengths[sample]][: None if last else 1])
            logits = model(indices[own], end, None if weights is None else weights[own])
            (gradient,) = torch.autograd.grad(F.cross_entropy(logits, batch[1][sample : sample + 1]), [model.w])
            found.append(gradient.flatten())
        return {"w": torch.stack(found)}

    model = Using(bags, w=numbers(rows, 3))
    layers = captured(model, None, samples, losses, loop)
    assert layers["w"].kind == "embedding"
