"""A small network, its pictures, a recorder of it, and the comparison with the plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.recorder import Recorder
from metaql.storage.recording.sample_gradients import SampleGradients
from tests.recording.reference import assert_close, by_loop, split_by_parameter


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def assert_exact():
    """Asserts that a model's recorded gradients equal those of the loop; returns the layers they form."""

    def check(model, batch, samples, losses=None, tolerance=1e-9, mode="eval"):
        model.train(mode == "train")
        dtype = {torch.float64: "float64", torch.float32: "float32"}[next(model.parameters()).dtype]
        parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        source = SampleGradients(ModelLosses(model, losses), parameters, dtype)
        result = source.of(batch, np.arange(samples))
        expected = by_loop(model, batch, samples, losses)
        assert_close(split_by_parameter(source.layers, result.blocks), expected, tolerance)
        return {layer.name: layer for layer in source.layers}

    return check


class SmallNetwork(nn.Module):
    """A convolution, a normalisation and two linear layers, with an activation in place."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.hidden = nn.Linear(4 * 3 * 3, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, pictures):
        maps = F.max_pool2d(F.relu(self.norm(self.conv(pictures)), inplace=True), 2)
        return self.head(torch.tanh(self.hidden(maps.flatten(1))))


@pytest.fixture
def network():
    return SmallNetwork().double()


@pytest.fixture
def pictures():
    """40 pictures [1, 6, 6] and their classes, of three."""
    return torch.randn(40, 1, 6, 6, dtype=torch.float64), torch.randint(0, 3, (40,))


@pytest.fixture
def recorder(network, tmp_path):
    """A recorder in float64 with a checkpoint of the network."""
    with Recorder(network, tmp_path / "store", dtype="float64") as made:
        made.checkpoint()
        yield made
