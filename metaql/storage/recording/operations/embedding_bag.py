"""y = a weighted sum of a table's rows for each bag: the gradient is dy, times the weight, in each of these rows.

Bags may differ in length. Shorter ones are filled up with row 0 at weight zero, which leaves no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.storage.recording.operations.operation import Operation, Use, at_least_float32

SUM, MEAN = 0, 1


def _suffix(use: Use, dy: Tensor) -> Tensor:
    rows, _ = use.settings
    assert isinstance(rows, Tensor)
    return rows


def _prefix(use: Use, dy: Tensor) -> Tensor:
    _, weights = use.settings
    assert isinstance(weights, Tensor)
    return at_least_float32(dy).unsqueeze(1) * weights.unsqueeze(-1).to(dy.dtype)


EMBEDDING_BAG = Operation("embedding", _suffix, _prefix, reads_input=False)


def embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = SUM,
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> list[Use]:
    """The use in a call of ``torch.embedding_bag`` that sums or averages."""
    if scale_grad_by_freq or mode not in (SUM, MEAN):
        return []
    places, inside = _bags(offsets, len(indices), include_last_offset)
    rows = torch.where(inside, indices.long()[places], 0)
    if padding_idx is not None:
        inside = inside & (rows != padding_idx % len(weight))
    weights = inside.to(weight.dtype)
    if mode == MEAN:
        weights = weights / inside.sum(1, keepdim=True).clamp(min=1)
    if per_sample_weights is not None:
        weights = weights * per_sample_weights.detach()[places]
    return [Use(EMBEDDING_BAG, indices, weight, None, (0,), settings=(rows, weights))]


def _bags(offsets: Tensor, length: int, include_last_offset: bool) -> tuple[Tensor, Tensor]:
    """Where each bag's elements are, [bags, the longest one's length], and which of these are within the bag."""
    offsets = offsets.long()
    ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([length])])
    lengths = ends - offsets[: len(ends)]
    numbers = torch.arange(int(lengths.max()) if len(lengths) else 0, device=offsets.device)
    inside = numbers < lengths.unsqueeze(1)
    return torch.where(inside, offsets[: len(ends), None] + numbers, 0), inside


FUNCTIONS = {torch.embedding_bag: embedding_bag}
