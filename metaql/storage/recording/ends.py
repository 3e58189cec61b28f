"""The last tensors of a forward pass that hold samples: the logits, or the samples' own losses.

What sample k's part of these depends on is sample k's. So a use before them is known to hold samples or not, also one
that nothing after it uses, such as a scale of constants whose shape happens to have the batch's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metaql.storage.recording.row_moves import tensors_in


class Ends:
    """Follows a pass of so many ``samples`` through what has as many in a dimension."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        # Held, so that no other tensor gets the same id.
        self._open: dict[int, Tensor] = {}

    def note(self, given: Sequence[Any], output: Any) -> None:
        """Takes down a call that has been made."""
        made = [each for each in tensors_in([output]) if each.requires_grad and self._samples in each.shape]
        if made:
            for each in tensors_in(given):
                self._open.pop(id(each), None)
            self._open.update((id(each), each) for each in made)

    def of(self, loss: Tensor) -> list[Tensor]:
        """Those that the loss depends on, and by no other of them."""
        ends: list[Tensor] = []
        rest = _reached(loss, [each for each in self._open.values() if each is not loss])
        while rest:
            *rest, last = rest
            ends.append(last)
            below = _reached(last, rest)
            rest = [each for each in rest if not any(each is other for other in below)]
        return ends[::-1]


def _reached(output: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Which of these the output depends on."""
    if not tensors:
        return []
    gradients = torch.autograd.grad(output, tensors, torch.ones_like(output), retain_graph=True, allow_unused=True)
    return [each for each, gradient in zip(tensors, gradients, strict=True) if gradient is not None]
