"""y = W[x]: the gradient of a table is dy in the rows that were looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.storage.recording.operations.operation import Operation, Use


def _rows(use: Use, dy: Tensor) -> Tensor:
    return use.inputs.long()


def _prefix(use: Use, dy: Tensor) -> Tensor:
    (padding,) = use.settings
    if padding < 0:
        return dy
    # The padding row gets no gradient, by torch's definition.
    return dy.masked_fill((use.inputs == padding).unsqueeze(-1), 0.0)


EMBEDDING = Operation("embedding", _rows, _prefix)


def embedding(
    weight: Tensor,
    indices: Tensor,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> list[Use]:
    """The use in a call of ``torch.embedding``; gradients scaled by frequency are left to the general way."""
    if scale_grad_by_freq:
        return []
    return [Use(EMBEDDING, indices, weight, None, tuple(range(indices.dim())), settings=(padding_idx,))]


FUNCTIONS = {torch.embedding: embedding}
