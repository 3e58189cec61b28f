"""The last tensors of a forward pass that hold samples: the logits, or the samples' own losses.

What sample k's part of these depends on is sample k's. So a use before them is known to hold samples or not, also one
that nothing after it uses, such as a scale of constants whose shape happens to have the batch's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.graph import Node

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
        used = _nodes_below(loss)
        rest = [each for each in self._open.values() if each.grad_fn in used and each is not loss]
        while rest:
            *rest, last = rest
            below = _nodes_below(last)
            # To run this node would start the ranks' exchange of gradients.
            if not any("DDPSink" in node.name() for node in below):
                ends.append(last)
                rest = [each for each in rest if each.grad_fn not in below]
        return ends[::-1]


def _nodes_below(output: Tensor) -> set[Node]:
    """All of the graph that the output comes from."""
    nodes: set[Node] = set()
    waiting = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            waiting += [each for each, _ in node.next_functions]
    return nodes
