"""Batches with targets drawn from the model's own predictions, over which curvature is the true Fisher matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metaql.storage.recording.losses import with_targets

# What cross entropy leaves out.
_IGNORED = -100


def with_sampled_labels(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
    """The batch with a class for each target, drawn from the model's probabilities; positions that are ignored stay so.

    The batch is one of the default loss. Draws are made on the CPU: the same on every device.
    """

    def draw(logits: Tensor, targets: Tensor) -> Tensor:
        # Whatever is drawn for a sample without chances, its loss will be found to be none.
        chances = logits.float().softmax(1).movedim(1, -1).cpu().nan_to_num(nan=1.0)
        drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator)
        drawn = drawn.reshape(chances.shape[:-1]).to(targets.device)
        return drawn if targets.is_floating_point() else drawn.masked_fill(targets == _IGNORED, _IGNORED)

    return with_targets(model, batch, draw)
