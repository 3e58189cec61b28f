"""Each operation with factors, over random shapes, against the loop over samples."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.recording.reference import one_by_one
from tests.recording.using import captured, numbers, using_module

DEADLINE = None
few = settings(max_examples=25, deadline=DEADLINE, derandomize=True)


@few
@given(
    samples=st.integers(1, 6),
    leading=st.lists(st.integers(1, 5), max_size=2),
    widths=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    bias=st.booleans(),
)
def test_linear(samples, leading, widths, bias):
    body = using_module(nn.Linear(*widths, bias=bias))
    (layer,) = captured(body, numbers(samples, *leading, widths[0]), samples).values()
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
    (layer,) = captured(using_module(body), numbers(samples, channels[0], *size), samples).values()
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
    (layer,) = captured(using_module(body), torch.randint(0, table[0], (samples, length)), samples).values()
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
    (layer,) = captured(using_module(body), numbers(samples, channels, *spatial) * 2 + 1, samples).values()
    assert layer.kind == "norm"


@pytest.mark.parametrize("samples, length", [(5, 3), (4, 4), (3, 6), (6, 3)])
def test_samples_need_not_come_first(samples, length):
    """Time in the first dimension, also where it is as long as the batch."""
    body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5))

    def loop(model, batch, samples, _):
        def loss_of(sample):
            own = slice(sample, sample + 1)
            return F.cross_entropy(model(batch[0][:, own]), batch[1][own])

        return one_by_one(model, samples, loss_of)

    captured(using_module(body, axis=1), numbers(length, samples, 4), samples, loop=loop)


def test_single_precision_agrees_to_its_rounding(assert_exact):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 36, 16), nn.Tanh(),
        nn.Linear(16, 3),
    )  # fmt: skip
    assert_exact(model, (torch.randn(9, 3, 6, 6), torch.arange(9) % 3), 9, tolerance=1e-5)
