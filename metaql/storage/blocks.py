"""Gradients of a few samples in memory, factored or laid out in full, and the way from one to the other.

Letters: n samples, s positions, g groups, i one group's input width, o one group's output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

import torch
from torch import Tensor

from metaql.storage.patches import multiply_patches, unfold
from metaql.storage.schema import Layer, parts

# Samples that differ in their number of positions are read more slowly: merging has to save this much.
_WORTH_MERGING = 0.1


@dataclass(frozen=True)
class Factored:
    """The prefixes and suffixes of ``samples`` samples, their positions one after another.

    ``prefix`` is [positions, g·o]. ``suffix`` is [positions, g·i]; for an embedding int64 [positions], the
    table's row at each; for a layer with ``unfold`` [n, elements], the convolution's own input, from which
    ``rows`` makes the positions. ``offsets`` (int64 [n + 1]) says where each sample's positions begin; None
    means that every sample has the same number.
    """

    suffix: Tensor
    prefix: Tensor
    samples: int
    offsets: Tensor | None = None

    def each(self, change: Callable[[Factored], Factored]) -> Factored:
        """The block changed; as ``Tied.each`` for the one part there is."""
        return change(self)


@dataclass(frozen=True)
class Tied:
    """The factors of a tied layer's two parts, for the same samples: the gradient is the sum of both."""

    projection: Factored
    table: Factored

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.projection.samples

    def each(self, change: Callable[[Factored], Factored]) -> Tied:
        """Both parts changed alike."""
        return Tied(change(self.projection), change(self.table))


@dataclass(frozen=True)
class Full:
    """Laid-out gradients, [n, layer.width]: the weight flattened row-major, then the bias."""

    gradient: Tensor

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.gradient.shape[0]


Factors = Factored | Tied
Block = Factors | Full


def split(layer: Layer, block: Factors) -> tuple[tuple[Layer, Factored], ...]:
    """A block as the terms of a sum, each with the layer that it is like one of."""
    if isinstance(block, Factored):
        return ((layer, block),)
    projection, table = parts(layer)
    return (projection, block.projection), (table, block.table)


def stored(layer: Layer, block: Block) -> tuple[tuple[Layer, Factored | Full], ...]:
    """A block as it is stored: its parts, each with the layer it is written as."""
    return ((layer, block),) if isinstance(block, Full) else split(layer, block)


def size(block: Block) -> int:
    """The bytes a block keeps alive."""
    if isinstance(block, Full):
        return block.gradient.nbytes
    if isinstance(block, Tied):
        return size(block.projection) + size(block.table)
    return block.suffix.nbytes + block.prefix.nbytes


def whole(found: Sequence[Block]) -> Block:
    """The block of a layer from those of its parts."""
    if len(found) == 1:
        return found[0]
    projection, table = found
    assert isinstance(projection, Factored)
    assert isinstance(table, Factored)
    return Tied(projection, table)


def take(block: Block, samples: Tensor) -> Block:
    """The block of some of its samples, by their places in it (int64)."""
    if isinstance(block, Full):
        return Full(block.gradient[samples])
    return block.each(lambda part: _take(part, samples))


def _take(block: Factored, samples: Tensor) -> Factored:
    samples = samples.to(block.prefix.device)
    if block.offsets is None:
        counts = [values.shape[0] // max(block.samples, 1) for values in (block.suffix, block.prefix)]
        suffix, prefix = (
            values.unflatten(0, (block.samples, each))[samples].flatten(0, 1)
            for values, each in zip((block.suffix, block.prefix), counts, strict=True)
        )
        return Factored(suffix, prefix, len(samples))
    lengths = block.offsets.diff()[samples]
    offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    within = torch.arange(int(offsets[-1]), device=samples.device) - offsets[:-1].repeat_interleave(lengths)
    places = block.offsets[:-1][samples].repeat_interleave(lengths) + within
    suffix = block.suffix[samples] if len(block.suffix) != len(block.prefix) else block.suffix[places]
    return Factored(suffix, block.prefix[places], len(samples), offsets)


def rows(layer: Layer, block: Factored) -> Factored:
    """The block with one suffix row a position: unfolds a convolution's stored input, else changes nothing."""
    if layer.unfold is None:
        return block
    inputs = block.suffix.reshape(block.samples, *layer.unfold.input_shape)
    suffix = unfold(layer.unfold, inputs).flatten(0, 1)
    return Factored(suffix, block.prefix, block.samples, block.offsets)


def owners(block: Factored) -> Tensor:
    """Which sample each position belongs to, int64 [positions]."""
    samples = torch.arange(block.samples, device=block.prefix.device)
    if block.offsets is None:
        return samples.repeat_interleave(block.prefix.shape[0] // max(block.samples, 1))
    return samples.repeat_interleave(block.offsets.diff())


def cut(block: Factored, part: slice) -> Factored:
    """The samples of one slice, as views."""
    samples = part.stop - part.start
    if samples == block.samples:
        return block
    if block.offsets is None:
        each = block.prefix.shape[0] // max(block.samples, 1)
        begin, end = part.start * each, part.stop * each
        return Factored(block.suffix[begin:end], block.prefix[begin:end], samples)
    offsets = block.offsets[part.start : part.stop + 1]
    begin, end = int(offsets[0]), int(offsets[-1])
    return Factored(block.suffix[begin:end], block.prefix[begin:end], samples, offsets - begin)


def lay_out(layer: Layer, block: Block, out: Tensor | None = None) -> Tensor:
    """The gradients themselves, [n, layer.width]; in ``out`` where there is one."""
    if isinstance(block, Tied):
        (projection, first), (table, second) = split(layer, block)
        return lay_out(projection, first, out).add_(lay_out(table, second))
    if isinstance(block, Factored) and block.offsets is None and _by_products(layer):
        return _lay_out_products(layer, block, out)
    gradients = block.gradient if isinstance(block, Full) else _laid_out(layer, rows(layer, block))
    return gradients if out is None else out.copy_(gradients)


def _by_products(layer: Layer) -> bool:
    """Whether its gradients are products of columns with rows."""
    return layer.unfold is not None or (layer.kind in ("linear", "conv") and layer.groups == 1)


def _lay_out_products(layer: Layer, block: Factored, out: Tensor | None) -> Tensor:
    """Written where they belong at once: a copy, or fresh pages for one, takes as long as the products."""
    n, (outputs, *_) = block.samples, layer.parameters[0].shape
    split = (n, len(block.prefix) // max(n, 1))
    found = block.prefix.new_empty(n, layer.width) if out is None else out
    weight, prefix = found[:, : layer.parameters[0].width], block.prefix.unflatten(0, split)
    products, columns = weight.unflatten(1, (outputs, -1)), prefix.transpose(1, 2)
    if layer.unfold is None:
        torch.bmm(columns, block.suffix.unflatten(0, split), out=products)
    else:
        multiply_patches(layer.unfold, layer.groups, columns, block.suffix, products)
    if layer.has_bias:
        torch.sum(prefix, 1, out=found[:, weight.shape[1] :])
    return found


def _laid_out(layer: Layer, block: Factored) -> Tensor:
    weight = weight_gradient(layer.kind, block, layer.groups, layer.parameters[0].shape)
    if not layer.has_bias:
        return weight
    return torch.cat([weight, sum_by_sample(block, block.prefix)], dim=1)


def weight_gradient(kind: str, block: Factored, groups: int, shape: tuple[int, ...]) -> Tensor:
    """The gradient of a weight of this shape, flattened, [n, elements], from one suffix row a position."""
    if block.offsets is None:
        positions = block.prefix.shape[0] // max(block.samples, 1)
        split = (block.samples, positions)
        return products(kind, block.suffix.unflatten(0, split), block.prefix.unflatten(0, split), groups, shape)
    pieces = [
        products(kind, block.suffix[begin:end].unsqueeze(0), block.prefix[begin:end].unsqueeze(0), groups, shape)
        for begin, end in pairwise(block.offsets.tolist())
    ]
    return torch.cat([block.prefix.new_zeros(0, prod(shape)), *pieces])


def products(kind: str, suffix: Tensor, prefix: Tensor, groups: int, shape: tuple[int, ...]) -> Tensor:
    """Σ_s of the products of suffixes [n, s, g·i] and prefixes [n, s, g·o] that a kind of layer takes, [n, elements].

    An embedding's suffixes are the rows it looked up, [n, s].
    """
    if kind == "embedding":
        return _table_rows(suffix, prefix, shape[0])
    if kind == "norm":
        return (prefix * suffix).sum(1)
    if groups == 1:
        return torch.bmm(prefix.transpose(1, 2), suffix).flatten(1)
    split = [values.unflatten(2, (groups, values.shape[2] // groups)) for values in (prefix, suffix)]
    return torch.einsum("nsgo,nsgi->ngoi", *split).flatten(1)


def merge_rows(block: Factored) -> Factored:
    """A table's factors, as many positions for each sample, with one position for each row it looked up.

    A row's prefixes are summed. Unchanged where that makes hardly fewer.
    """
    if not len(block.suffix):
        return block
    rows, order = block.suffix.reshape(block.samples, -1).sort(dim=1, stable=True)
    first = torch.ones_like(rows, dtype=torch.bool)
    first[:, 1:] = rows[:, 1:] != rows[:, :-1]
    begin = first.flatten().nonzero().squeeze(1)
    if len(begin) > (1 - _WORTH_MERGING) * len(block.suffix):
        return block
    samples = torch.arange(block.samples, device=rows.device).unsqueeze(1)
    places = (order + samples * rows.shape[1]).flatten()
    # As fast as a copy, which index_add_ is not.
    prefix = torch.nn.functional.embedding_bag(places, block.prefix, begin, mode="sum")
    return Factored(rows.flatten()[begin], prefix, block.samples, offsets_of(first.sum(1)))


def offsets_of(lengths: Tensor) -> Tensor | None:
    """Where each sample's positions begin; None where all have as many."""
    if bool((lengths == lengths[0]).all()):
        return None
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def sum_by_sample(block: Factored, values: Tensor) -> Tensor:
    """Values of each position summed within each sample: [positions, ...] => [n, ...]."""
    if block.offsets is None:
        # Said in numbers: of no values torch can't tell how many there are of each.
        each = len(values) // max(block.samples, 1)
        return values.reshape(block.samples, each, *values.shape[1:]).sum(1)
    total = values.new_zeros(block.samples, *values.shape[1:])
    return total.index_add_(0, owners(block), values)


def _table_rows(suffix: Tensor, prefix: Tensor, table_rows: int) -> Tensor:
    """The gradient of an embedding's table: each prefix added to the row that its position looked up."""
    n, _, width = prefix.shape
    total = prefix.new_zeros(n * table_rows, width)
    places = torch.arange(n, device=prefix.device).unsqueeze(1) * table_rows + suffix
    return total.index_add_(0, places.flatten(), prefix.flatten(0, 1)).reshape(n, -1)
