"""y = x Wᵀ + b, on any number of leading dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.storage.recording.operations.operation import Operation, Use

LINEAR = Operation("linear", suffix=lambda use: use.inputs, prefix=lambda use, dy: dy)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Use | None:
    """The use in a call of ``F.linear``; a weight that is a vector is left to the general way."""
    if weight.dim() != 2:
        return None
    return Use(LINEAR, input, weight, bias, leading=input.dim() - 1)


FUNCTIONS = {torch._C._nn.linear: linear}
