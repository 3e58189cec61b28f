"""A captured use with its gradient, samples first."""

from __future__ import annotations

from collections.abc import Hashable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor

from metaql.storage.blocks import products
from metaql.storage.patches import multiply_patches
from metaql.storage.recording.alignment import Alignment
from metaql.storage.recording.capture import CapturedUse
from metaql.storage.recording.operations.operation import at_least_float32
from metaql.storage.schema import Unfold


@dataclass(frozen=True)
class AlignedUse:
    """The factors of one operation for a batch of n ``samples``, from dC/dy of the operation's output."""

    captured: CapturedUse
    alignment: Alignment
    samples: int
    dy: Tensor

    @cached_property
    def prefix(self) -> Tensor:
        """[n, positions, output width], in float32 or float64."""
        use = self.captured.use
        return at_least_float32(self._align(use.operation.prefix(use, self.dy)).flatten(1, -2))

    @cached_property
    def suffix(self) -> Tensor:
        """[n, positions, input width of all groups]; an embedding's rows, [n, positions].

        Under autocast the operation rounded its input to the type of its output, and so does the suffix.
        """
        use = self.captured.use
        values = self._align(use.operation.suffix(use, self.dy).detach())
        if use.operation.kind == "embedding":
            return values.flatten(1)
        return at_least_float32(values.flatten(1, -2).to(self.dy.dtype))

    @property
    def suffix_mark(self) -> Hashable:
        """Equal for uses with the same suffix; None where that can't be told without making it."""
        use, inputs = self.captured.use, self.captured.use.inputs
        made_by = use.operation.suffix_mark(use)
        if made_by is None:
            return None
        place = inputs.data_ptr(), inputs.device, inputs.dtype, inputs.shape, inputs.stride()
        return made_by, place, use.axes, self.captured.leading, self.alignment, self.dy.dtype

    @property
    def kept_input(self) -> Tensor:
        """What the suffix is unfolded from, a convolution's own input, [n, elements]."""
        use = self.captured.use
        return self._align(use.operation.kept(use, self.dy).detach()).flatten(1)

    def weight_gradient(self, shape: tuple[int, ...], chosen: Sequence[int] | None = None) -> Tensor:
        """What this use adds to its weight's gradient, [n or the chosen samples, elements]."""
        use = self.captured.use
        rows = slice(None) if chosen is None else list(chosen)
        prefix = self.prefix[rows]
        if use.geometry is not None and self.alignment == Alignment(0) and self.dy.shape[0] == self.samples:
            return self._of_patches(use.geometry, prefix, self.kept_input[rows], shape)
        return products(use.operation.kind, self.suffix[rows], prefix, use.groups, shape)

    def _of_patches(self, geometry: Unfold, prefix: Tensor, inputs: Tensor, shape: tuple[int, ...]) -> Tensor:
        inputs = at_least_float32(inputs.to(self.dy.dtype))
        gradients = prefix.new_empty(len(prefix), prefix.shape[2], prod(shape[1:]))
        multiply_patches(geometry, self.captured.use.groups, prefix.transpose(1, 2), inputs, gradients)
        return gradients.flatten(1)

    def bias_gradient(self, chosen: Sequence[int] | None = None) -> Tensor:
        """What this use adds to its bias' gradient, [n or the chosen samples, output width]."""
        return (self.prefix if chosen is None else self.prefix[list(chosen)]).sum(1)

    def mixture(self, weights: Tensor | None = None, magnitudes: bool = False) -> dict[str, Tensor]:
        """name => what this use adds to its parameters' gradients of Σ_k weights_k · C_k, flattened.

        Without weights, to those of the loss that was differentiated. ``magnitudes`` adds up the terms' absolute
        values instead, which say how much of the sum may be rounding.
        """
        use, captured = self.captured.use, self.captured
        prefix = self.prefix if weights is None else self.prefix * weights.to(self.prefix)[:, None, None]
        prefix = prefix.flatten(0, 1)
        prefix = prefix.abs() if magnitudes else prefix
        found = {} if captured.bias is None else {captured.bias: prefix.sum(0)}
        if captured.weight is not None and use.weight is not None:
            suffix, shape = self.suffix.flatten(0, 1), tuple(use.weight.shape)
            suffix = suffix.abs() if magnitudes else suffix
            found[captured.weight] = products(use.operation.kind, suffix[None], prefix[None], use.groups, shape)[0]
        return found

    def _align(self, values: Tensor) -> Tensor:
        return self.alignment.apply(values, len(self.captured.leading), self.samples)


def mixtures(
    uses: Sequence[AlignedUse], names: Set[str], weights: Tensor | None = None, magnitudes: bool = False
) -> dict[str, Tensor]:
    """name => [1, elements]: what these parameters' uses add up to, as in ``AlignedUse.mixture``; float64, CPU."""
    sums: dict[str, Tensor] = {}
    for use in uses:
        own = (use.captured.weight, use.captured.bias)
        if not names.isdisjoint(own):
            for name, gradient in use.mixture(weights, magnitudes).items():
                if name in names:
                    part = gradient.double().cpu().unsqueeze(0)
                    sums[name] = sums[name] + part if name in sums else part
    return sums
