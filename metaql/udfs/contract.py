"""Inner products of factored gradients with laid-out ones, by contraction.

    ⟨g, G⟩ = Σ_s b_sᵀ G a_s + b_s·G_bias

Letters: n samples, p all their positions, g groups, i one group's input width, o one group's output width,
v rows of an embedding's table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.storage.blocks import Factored, Factors, cut, split, sum_by_sample
from metaql.storage.schema import Layer
from metaql.udfs.costs import COLUMNS
from metaql.udfs.scratch import product
from metaql.udfs.slices import by_group, joined, padded, positions, row_dots, single, steps, summed


def contract(layer: Layer, block: Factors, gradient: Tensor, weight: bool, bias: bool) -> Tensor:
    """Each sample's inner product with one laid-out gradient [layer.width]: [n]."""
    return summed([_contract(part, factors, gradient, weight, bias) for part, factors in split(layer, block)])


def _contract(layer: Layer, block: Factored, gradient: Tensor, weight: bool, bias: bool) -> Tensor:
    i, o = widths(layer)
    wider = o if layer.kind == "embedding" else max(layer.groups * i, o)
    parts = []
    for part in steps(block.samples, positions(block) * wider):
        piece = cut(block, part)
        products = _by_position(layer, piece, gradient, weight, bias)
        parts.append(products if single(piece) else sum_by_sample(piece, products))
    return joined(parts, block.prefix.new_zeros(0))


def _by_position(layer: Layer, block: Factored, gradient: Tensor, weight: bool, bias: bool) -> Tensor:
    """b_sᵀ G a_s + b_s·G_bias for each position: [p]."""
    size = layer.parameters[0].width
    if not weight:
        return block.prefix @ gradient[size:]
    matrix = gradient[:size]
    if layer.kind == "embedding":
        return row_dots(block.prefix, matrix.reshape(widths(layer))[block.suffix])
    products = _grouped(layer, block, matrix) if layer.groups > 1 else _single(layer, block, matrix)
    return products.add_(block.prefix @ gradient[size:]) if bias else products


def _single(layer: Layer, block: Factored, matrix: Tensor) -> Tensor:
    """The product runs over the narrower side: the thin result of the other way is slower to make."""
    # Multiplied in place: torch's vecdot makes a copy, in fresh pages.
    i, o = widths(layer)
    matrix = matrix.reshape(o, i)
    if matrix.shape[0] <= matrix.shape[1]:
        return product(block.prefix, matrix).mul_(block.suffix).sum(1)
    return product(block.suffix, matrix.T).mul_(block.prefix).sum(1)


def _grouped(layer: Layer, block: Factored, matrix: Tensor) -> Tensor:
    prefix, suffix = by_group(block.prefix, layer.groups), by_group(block.suffix, layer.groups)
    matrix = matrix.reshape(layer.groups, prefix.shape[2], suffix.shape[2])
    products: Tensor = (torch.einsum("pgo,goi->pgi", prefix, matrix) * suffix).sum((1, 2))
    return products


def contract_matrix(layer: Layer, block: Factors, gradients: Tensor, weight: bool, bias: bool) -> Tensor:
    """Each sample's inner product with each of some laid-out gradients [r, layer.width]: [n, r]."""
    if len(gradients) == 1:
        return contract(layer, block, gradients[0], weight, bias).unsqueeze(1)
    return summed([_contract_matrix(part, factors, gradients, weight, bias) for part, factors in split(layer, block)])


def _contract_matrix(layer: Layer, block: Factored, gradients: Tensor, weight: bool, bias: bool) -> Tensor:
    result = block.prefix.new_zeros(block.samples, len(gradients))
    if not weight or layer.kind == "embedding" or layer.groups > 1:
        for place, gradient in enumerate(gradients):
            result[:, place] = _contract(layer, block, gradient, weight, bias)
        return result
    size, narrow = layer.parameters[0].width, min(widths(layer))
    matrices = _side_by_side(layer, gradients[:, :size])
    for across in steps(len(gradients), narrow, 4 * COLUMNS):
        several = matrices[:, across.start * narrow : across.stop * narrow]
        for part in steps(block.samples, positions(block) * several.shape[1]):
            piece = cut(block, part)
            products = _by_gradient(layer, piece, several)
            if bias:
                products += piece.prefix @ gradients[across, size:].T
            result[part, across] = products if single(piece) else sum_by_sample(piece, products)
    return result


def _side_by_side(layer: Layer, gradients: Tensor) -> Tensor:
    """Weights' gradients [r, o·i] as one matrix with the wider side in rows, [i, r·o] or [o, r·i]."""
    i, o = widths(layer)
    matrices = gradients.unflatten(1, (o, i))
    found: Tensor = matrices.flatten(0, 1).T if o <= i else matrices.transpose(0, 1).flatten(1)
    return found


def _by_gradient(layer: Layer, block: Factored, matrices: Tensor) -> Tensor:
    """b_sᵀ G a_s for each position and each of the matrices side by side: [p, r].

    The product runs over the wider side, so that its result is small; with several of them it is not a thin one.
    """
    i, o = widths(layer)
    wide, narrow = (block.suffix, block.prefix) if o <= i else (block.prefix, block.suffix)
    products = product(wide, matrices).unflatten(1, (-1, narrow.shape[1]))
    found: Tensor = products.mul_(narrow.unsqueeze(1)).sum(2)
    return found


def contract_pairs(layer: Layer, block: Factors, gradients: Tensor, weight: bool, bias: bool) -> Tensor:
    """Each sample's inner product with the laid-out gradient beside it, [n, layer.width]: [n]."""
    return summed([_contract_pairs(part, factors, gradients, weight, bias) for part, factors in split(layer, block)])


def _contract_pairs(layer: Layer, block: Factored, gradients: Tensor, weight: bool, bias: bool) -> Tensor:
    block, size = padded(block), layer.parameters[0].width
    each = block.prefix.shape[0] // max(block.samples, 1)
    prefix = block.prefix.reshape(block.samples, each, block.prefix.shape[1])
    result = block.prefix.new_zeros(block.samples)
    if bias:
        result += row_dots(prefix.sum(1), gradients[:, size:])
    if weight:
        result += _weights_of_pairs(layer, block, prefix, gradients[:, :size])
    return result


def _weights_of_pairs(layer: Layer, block: Factored, prefix: Tensor, matrices: Tensor) -> Tensor:
    i, o = widths(layer)
    n, s, g = block.samples, prefix.shape[1], layer.groups
    if layer.kind == "embedding":
        samples = torch.arange(n, device=prefix.device).unsqueeze(1)
        rows = matrices.reshape(n, i, o)[samples, block.suffix.reshape(n, s)]
        return (rows * prefix).sum((1, 2))
    suffix = block.suffix.reshape(n, s, g, i)
    projected = torch.einsum("nsgo,ngoi->nsgi", prefix.reshape(n, s, g, o // g), matrices.reshape(n, g, o // g, i))
    result: Tensor = (projected * suffix).sum((1, 2, 3))
    return result


def weighted_sum(layer: Layer, block: Factors, weights: Tensor) -> Tensor:
    """Σ_n weights_n g_n laid out, in one product over all positions: [layer.width]."""
    return summed([_weighted_sum(part, factors, weights) for part, factors in split(layer, block)])


def weighted(block: Factored, weights: Tensor) -> Tensor:
    """The prefixes, each multiplied with its sample's weight."""
    each = block.prefix.shape[0] // max(block.samples, 1)
    lengths = each if block.offsets is None else block.offsets.diff()
    return block.prefix * weights.repeat_interleave(lengths).unsqueeze(1)


def _weighted_sum(layer: Layer, block: Factored, weights: Tensor) -> Tensor:
    # An average's weights are all the same: the sum is multiplied, not every prefix.
    alike = len(weights) > 0 and bool((weights == weights[0]).all())
    prefix = block.prefix if alike else weighted(block, weights)
    total = _weight_sum(layer, block.suffix, prefix).flatten()
    total = torch.cat([total, prefix.sum(0)]) if layer.has_bias else total
    return total.mul_(weights[0]) if alike else total


def _weight_sum(layer: Layer, suffix: Tensor, prefix: Tensor) -> Tensor:
    if layer.kind == "embedding":
        return prefix.new_zeros(widths(layer)).index_add_(0, suffix, prefix)
    if layer.groups == 1:
        return prefix.T @ suffix
    prefix, suffix = by_group(prefix, layer.groups), by_group(suffix, layer.groups)
    total: Tensor = torch.einsum("pgo,pgi->goi", prefix, suffix)
    return total


def widths(layer: Layer) -> tuple[int, int]:
    """(input width of a group, output width) of a layer that has factors."""
    assert layer.input_width is not None
    assert layer.output_width is not None
    return layer.input_width, layer.output_width
