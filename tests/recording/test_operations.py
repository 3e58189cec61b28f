"""Each operation with factors, over random shapes, against the loop over samples."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.sample_gradients import SampleGradients
from tests.recording.reference import assert_close, by_loop, split_by_parameter

DEADLINE = None
few = settings(max_examples=25, deadline=DEADLINE, derandomize=True)


class Head(nn.Module):
    """Squeezes whatever comes out of a module into three logits a sample, with no parameter of its own."""

    def __init__(self, body, positions_first=False):
        super().__init__()
        self.body = body
        self.positions_first = positions_first

    def forward(self, inputs):
        out = self.body(inputs)
        if self.positions_first:
            out = out.movedim(1, 0)
        flat = torch.sin(3 * out).flatten(1)
        return torch.stack([flat.mean(1), flat.square().mean(1), flat[:, 0]], dim=1) * 3


def exact(body, inputs, samples, positions_first=False, loop=None):
    model = Head(body.double(), positions_first).eval()
    batch = (inputs, torch.arange(samples) % 3)
    source = SampleGradients(ModelLosses(model, None), dict(model.named_parameters()), "float64")
    blocks = source.of(batch, np.arange(samples)).blocks
    expected = loop(model, batch) if positions_first else by_loop(model, batch, samples)
    assert_close(split_by_parameter(source.layers, blocks), expected, 1e-9)
    return source.layers


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


@few
@given(
    samples=st.integers(1, 6),
    leading=st.lists(st.integers(1, 5), max_size=2),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    bias=st.booleans(),
)
def test_linear(samples, leading, widths, bias):
    (layer,) = exact(nn.Linear(*widths, bias=bias), numbers(samples, *leading, widths[0]), samples)
    assert layer.kind == "linear"
    assert layer.has_bias == bias


@settings(max_examples=80, deadline=DEADLINE, derandomize=True)
@given(data=st.data(), dimensions=st.integers(1, 3))
def test_convolution(data, dimensions):
    draw = data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]), "groups")
    channels = (groups * draw(st.integers(1, 2), "in"), groups * draw(st.integers(1, 3), "out"))

    def each(low, high, name):
        return tuple(draw(st.integers(low, high), name) for _ in range(dimensions))

    kernel, stride, dilation = each(1, 3, "kernel"), each(1, 2, "stride"), each(1, 2, "dilation")
    mode = draw(st.sampled_from(["zeros", "circular", "reflect", "replicate"]), "mode")
    padding = draw(st.one_of(st.just("same"), st.just("valid"), st.just(each(0, 2, "padding"))), "how")
    if padding == "same":
        stride = (1,) * dimensions
    size = each(6, 8, "size")
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    body = kind(*channels, kernel, stride, padding, dilation, groups, draw(st.booleans(), "bias"), mode)
    samples = draw(st.integers(1, 4), "samples")
    (layer,) = exact(body, numbers(samples, channels[0], *size), samples)
    assert layer.kind == "conv"


@few
@given(
    samples=st.integers(1, 6),
    length=st.integers(1, 5),
    table=st.tuples(st.integers(2, 9), st.integers(1, 5)),
    padding=st.booleans(),
    sparse=st.booleans(),
)
def test_embedding(samples, length, table, padding, sparse):
    body = nn.Embedding(*table, padding_idx=1 if padding else None, sparse=sparse)
    (layer,) = exact(body, torch.randint(0, table[0], (samples, length)), samples)
    assert layer.kind == "embedding"


@few
@given(data=st.data())
def test_normalisations(data):
    draw = data.draw
    samples, channels = draw(st.integers(1, 5), "samples"), 2 * draw(st.integers(1, 3), "channels")
    spatial = draw(st.lists(st.integers(2, 4), min_size=2, max_size=2), "spatial")
    body = draw(
        st.sampled_from(
            [
                nn.BatchNorm2d(channels),
                nn.GroupNorm(2, channels),
                nn.InstanceNorm2d(channels, affine=True),
                nn.InstanceNorm2d(channels, affine=True, track_running_stats=True),
                nn.LayerNorm(spatial),
                nn.LayerNorm(spatial[1:], bias=False),
                nn.RMSNorm(spatial[1:]),
            ]
        ),
        "body",
    )
    (layer,) = exact(body, numbers(samples, channels, *spatial) * 2 + 1, samples)
    assert layer.kind == "norm"


@pytest.mark.parametrize("samples, length", [(5, 3), (4, 4), (3, 6), (6, 3)])
def test_samples_need_not_come_first(samples, length):
    """Time in the first dimension, also where it is as long as the batch."""
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))

    def loop(model, batch):
        rows = {name: [] for name, _ in model.named_parameters()}
        for sample in range(samples):
            model.zero_grad()
            F.cross_entropy(model(batch[0][:, sample : sample + 1]), batch[1][sample : sample + 1]).backward()
            for name, parameter in model.named_parameters():
                rows[name].append(parameter.grad.flatten().clone())
        return {name: torch.stack(own) for name, own in rows.items()}

    exact(body, numbers(length, samples, 4), samples, positions_first=True, loop=loop)


def test_single_precision_agrees_to_its_rounding(assert_exact):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Tanh(),
        nn.Linear(16, 3),
    )  # fmt: skip
    assert_exact(model, (torch.randn(9, 3, 6, 6), torch.arange(9) % 3), 9, tolerance=1e-5)
