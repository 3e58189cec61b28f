"""Laid-out gradients of convolutions kept as their inputs, beside torch's own for one sample at a time."""

from __future__ import annotations

from math import prod

import pytest
import torch
from torch.nn import functional as F

from metaql.storage import patches
from metaql.storage.blocks import Factored, lay_out
from metaql.storage.schema import FACTORED, Layer, Parameter, Unfold

GEOMETRIES = {
    "one dimension": Unfold((2, 9), (3,), (2,), ((1, 1),), (1,)),
    "two dimensions": Unfold((2, 5, 6), (3, 2), (1, 2), ((1, 1), (0, 0)), (1, 2)),
    "padded on one side": Unfold((4, 4, 5), (2, 3), (1, 1), ((0, 1), (2, 0)), (1, 1)),
    "three dimensions": Unfold((2, 3, 4, 3), (2, 2, 1), (1, 1, 1), ((0, 0), (1, 1), (0, 0)), (1, 1, 1)),
}
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("samples", [0, 1, 5])
@pytest.mark.parametrize("together", [0.4, 1, 3, 8, "no patches"])
def test_convolutions(
    geometry: Unfold, groups: int, bias: bool, samples: int, together: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    channels, *_ = geometry.input_shape
    weight = torch.randn(6, channels // groups, *geometry.kernel, dtype=torch.float64, requires_grad=True)
    added = torch.randn(6, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(samples, *geometry.input_shape, dtype=torch.float64)
    made, expected = [], []
    for one in inputs:
        output = _convolved(geometry, one[None], weight, added, groups)
        prefix = torch.randn_like(output)
        wanted = torch.autograd.grad((output * prefix).sum(), [weight, added])
        made.append(prefix[0].flatten(1).T)
        expected.append(torch.cat([each.flatten() for each in wanted[: 1 + bias]]))
    positions = len(made[0]) if made else 4
    parameters = (Parameter("c.weight", tuple(weight.shape)), Parameter("c.bias", (6,)))[: 1 + bias]
    width = prod(weight.shape[1:])
    layer = Layer("c", "conv", parameters, FACTORED, "float64", groups, width, 6, positions, geometry)
    block = Factored(inputs.flatten(1), torch.cat([*made, inputs.new_zeros(0, 6)]), samples)
    if isinstance(together, str):
        monkeypatch.setattr(patches, "_smaller_than_factors", lambda *_: samples > 0)
    else:
        monkeypatch.setattr(patches, "_smaller_than_factors", lambda *_: False)
        monkeypatch.setattr(patches, "_TOGETHER", int(together * 8 * groups * width * positions))
    found = lay_out(layer, block)
    assert found.shape == (samples, layer.width)
    space = torch.full((7, layer.width), torch.nan, dtype=torch.float64)
    assert lay_out(layer, block, space[:samples]).data_ptr() == space[:samples].data_ptr()
    for one, other, wanted in zip(found, space, expected, strict=False):
        torch.testing.assert_close(one, wanted, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other, one, rtol=0, atol=0)


def _convolved(
    geometry: Unfold, inputs: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, groups: int
) -> torch.Tensor:
    pads = [amount for pair in reversed(geometry.padding) for amount in pair]
    convolve = CONVOLUTIONS[len(geometry.kernel)]
    padded = F.pad(inputs, pads)
    return convolve(padded, weight, bias, geometry.stride, 0, geometry.dilation, groups)


def test_the_way_by_size() -> None:
    """Few channels and large images: a convolution. Many channels and small images: patches."""
    early, late = torch.zeros(2, 3, 32, 32), torch.zeros(2, 64, 4, 4)
    assert patches._smaller_than_factors(torch.zeros(2, 16, 1024), early, torch.zeros(2, 16, 27))
    assert not patches._smaller_than_factors(torch.zeros(2, 64, 16), late, torch.zeros(2, 64, 576))
