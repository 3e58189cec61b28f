"""A model that is one function of its parameters."""

import torch
from torch import nn


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
