"""The factors of a weight for one batch, from all the uses of it."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from metaql.storage.blocks import Factored, merge_rows
from metaql.storage.recording.aligned import AlignedUse

# What was made for other weights of the same batch, by what it was made of.
Suffixes = dict[Hashable, Tensor]


def factors(own: Sequence[AlignedUse], suffixes: Suffixes | None = None) -> Factored:
    """Each sample's positions of all uses (at least one, all of one kind); those of one row of a table merged.

    Weights whose uses all have the same inputs get one suffix, which ``suffixes`` passes on.
    """
    prefix = _joined([use.prefix for use in own])
    block = Factored(_suffix(own, {} if suffixes is None else suffixes), prefix.detach(), own[0].samples)
    return merge_rows(block) if own[0].captured.use.operation.kind == "embedding" else block


def _suffix(own: Sequence[AlignedUse], suffixes: Suffixes) -> Tensor:
    marks = tuple(use.suffix_mark for use in own)
    made = suffixes.get(marks)
    if made is None:
        made = _joined([use.suffix for use in own]).detach()
        if None not in marks:
            suffixes[marks] = made
    return made


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Each sample's positions of all uses, one after another: [n, s, ...] each => [positions, ...]."""
    return (torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]).flatten(0, 1)
