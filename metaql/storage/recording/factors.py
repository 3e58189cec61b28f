"""The factors of a weight for one batch, from all the uses of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaql.storage.blocks import Factored, merge_rows
from metaql.storage.recording.aligned import AlignedUse


def factors(own: Sequence[AlignedUse]) -> Factored:
    """Each sample's positions of all uses (at least one, all of one kind); those of one row of a table merged."""
    suffix, prefix = _joined([use.suffix for use in own]), _joined([use.prefix for use in own])
    block = Factored(suffix.detach(), prefix.detach(), own[0].samples)
    return merge_rows(block) if own[0].captured.use.operation.kind == "embedding" else block


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Each sample's positions of all uses, one after another: [n, s, ...] each => [positions, ...]."""
    return (torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]).flatten(0, 1)
