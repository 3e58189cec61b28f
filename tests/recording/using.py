"""A model that is one function of its parameters, and whether it is recorded exactly from what is captured."""

import numpy as np
import torch
from torch import nn

from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.plan import CAPTURED
from metaql.storage.recording.sample_gradients import SampleGradients
from tests.recording.reference import assert_close, by_loop, split_by_parameter


class Using(nn.Module):
    """Calls a function with its parameters and the inputs, and makes three logits a sample of what comes out."""

    def __init__(self, function, axis=0, **parameters):
        super().__init__()
        self.function, self.axis = function, axis
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs):
        out = self.function(self, *inputs).movedim(self.axis, 0)
        flat = torch.sin(3 * out).reshape(len(out), -1)
        return torch.stack([flat.mean(1), flat.square().mean(1), flat[:, 0]], dim=1) * 3


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float64)


def using_module(body, axis=0):
    """The model that is this module, with the samples in a dimension of its output, in evaluation mode."""
    model = Using(lambda model, x: model.body(x), axis)
    model.body = body.double()
    return model.eval()


def captured(model, inputs, samples, losses=None, loop=by_loop):
    """Asserts that the model is recorded exactly and from the captured operations alone; returns its layers by name."""
    batch = inputs if isinstance(inputs, tuple) else (inputs, torch.arange(samples) % 3)
    source = SampleGradients(ModelLosses(model, losses), dict(model.named_parameters()), "float64")
    blocks = source.of(batch, np.arange(samples)).blocks
    assert_close(split_by_parameter(source.layers, blocks), loop(model, batch, samples, losses), 1e-9)
    (plan,) = source._plans.values()
    assert set(plan.routes.values()) == {CAPTURED}, plan.routes
    return {layer.name: layer for layer in source.layers}
