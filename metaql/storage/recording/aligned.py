"""A captured use with its gradient, samples first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from metaql.storage.blocks import Factored, sum_by_sample, weight_gradient
from metaql.storage.recording.alignment import Alignment
from metaql.storage.recording.capture import CapturedUse


@dataclass(frozen=True)
class AlignedUse:
    """The factors of one operation for a batch of n ``samples``, from dC/dy of the operation's output.

    ``scale`` [n] turns the prefixes of the loss that was differentiated into those of the samples' own losses.
    """

    captured: CapturedUse
    alignment: Alignment
    samples: int
    dy: Tensor
    scale: Tensor | None = None

    @cached_property
    def prefix(self) -> Tensor:
        """[n, positions, output width]."""
        if self.scale is None:
            return self._unscaled()
        prefix = at_least_float32(self._unscaled())
        return prefix * self.scale.to(prefix.device, prefix.dtype)[:, None, None]

    def _unscaled(self) -> Tensor:
        use = self.captured.use
        return self._align(use.operation.prefix(use, self.dy)).flatten(1, -2)

    @cached_property
    def suffix(self) -> Tensor:
        """[n, positions, input width of all groups]; an embedding's rows, [n, positions]."""
        use = self.captured.use
        values = self._align(use.operation.suffix(use).detach())
        return values.flatten(1) if use.operation.kind == "embedding" else values.flatten(1, -2)

    @property
    def kept_input(self) -> Tensor:
        """The convolution's own input, [n, elements]."""
        return self._align(self.captured.use.inputs.detach()).flatten(1)

    @cached_property
    def block(self) -> Factored:
        """Its factors, one suffix row a position, in float32 or float64.

        Under autocast the operation rounded its input to the type of its output, and so does the suffix.
        """
        prefix, suffix = self.prefix.flatten(0, 1), self.suffix.flatten(0, 1)
        if suffix.is_floating_point():
            suffix = at_least_float32(suffix.to(self.dy.dtype))
        return Factored(suffix, at_least_float32(prefix), self.samples)

    def weight_gradient(self, shape: tuple[int, ...], chosen: Sequence[int] | None = None) -> Tensor:
        """What this use adds to its weight's gradient, [n or the chosen samples, elements]."""
        use = self.captured.use
        return weight_gradient(use.operation.kind, self._choose(chosen), use.groups, shape)

    def batch_gradients(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """What this use adds to the gradients that a backward pass leaves: the weight's and the bias', flattened."""
        use = self.captured.use
        one = Factored(self.block.suffix, at_least_float32(self._unscaled().flatten(0, 1)), 1)
        return weight_gradient(use.operation.kind, one, use.groups, shape)[0], one.prefix.sum(0)

    def bias_gradient(self, chosen: Sequence[int] | None = None) -> Tensor:
        """What this use adds to its bias' gradient, [n or the chosen samples, output width]."""
        block = self._choose(chosen)
        return sum_by_sample(block, block.prefix)

    def _choose(self, chosen: Sequence[int] | None) -> Factored:
        if chosen is None:
            return self.block
        suffix, prefix = (
            values.unflatten(0, (self.samples, -1))[list(chosen)].flatten(0, 1)
            for values in (self.block.suffix, self.block.prefix)
        )
        return Factored(suffix, prefix, len(chosen))

    def _align(self, values: Tensor) -> Tensor:
        return self.alignment.apply(values, self.captured.use.leading, self.samples)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision widened; float32 and float64 as they are."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
