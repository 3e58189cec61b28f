"""Inner products of factored gradients from their factors alone.

With suffixes a, prefixes b, positions s of the one sample and t of the other, and groups g:

    ⟨W, W'⟩ = Σ_g Σ_s Σ_t (a_gs·a'_gt)(b_gs·b'_gt)        ⟨bias, bias'⟩ = Σ_g Σ_s Σ_t b_gs·b'_gt

so a bias adds 1 to the first factor. For an embedding a is one-hot: a·a' is 1 where both positions looked up
the same row of the table. Letters: n pairs, l and r samples on either side, p and q all their positions,
i one group's input width, o one group's output width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.storage.blocks import Factored, sum_by_sample
from metaql.storage.schema import Layer
from metaql.udfs.slices import by_group, cut, joined, longest, padded, row_dots, single, steps


def gram_pairs(layer: Layer, left: Factored, right: Factored, weight: bool, bias: bool) -> Tensor:
    """The inner product of each left sample with the right sample beside it: [n]."""
    parts = [
        _gram_pairs(layer, padded(cut(left, part)), padded(cut(right, part)), weight, bias)
        for part in steps(left.samples, 2 * layer.groups * longest(left) * longest(right))
    ]
    return joined(parts, left.prefix.new_zeros(0))


def _gram_pairs(layer: Layer, left: Factored, right: Factored, weight: bool, bias: bool) -> Tensor:
    prefixes = _dots(left.prefix, right.prefix, left.samples, layer.groups)
    if not weight:
        return prefixes.sum((1, 2, 3))
    if layer.kind == "embedding":
        rows, others = (block.suffix.reshape(block.samples, 1, -1) for block in (left, right))
        suffixes = (rows.unsqueeze(3) == others.unsqueeze(2)).to(prefixes.dtype)
    else:
        suffixes = _dots(left.suffix, right.suffix, left.samples, layer.groups)
    return (prefixes * (suffixes + 1 if bias else suffixes)).sum((1, 2, 3))


def _dots(left: Tensor, right: Tensor, samples: int, groups: int) -> Tensor:
    """Each position of a sample with each of its partner's: [n·s, g·i], [n·t, g·i] => [n, g, s, t]."""
    if samples == left.shape[0] == right.shape[0] and groups == 1:
        # One position each: a batched product of single rows costs several times a plain one.
        return row_dots(left, right).reshape(samples, 1, 1, 1)
    a, b = (
        values.reshape(samples, len(values) // max(samples, 1), groups, values.shape[1] // groups)
        for values in (left, right)
    )
    dots: Tensor = torch.einsum("nsgi,ntgi->ngst", a, b)
    return dots


def gram_matrix(layer: Layer, left: Factored, right: Factored, weight: bool, bias: bool) -> Tensor:
    """The inner product of every left with every right sample: [l, r]."""
    if left.samples == 0 or right.samples == 0:
        return left.prefix.new_zeros(left.samples, right.samples)
    each = left.prefix.shape[0] / max(left.samples, 1)
    parts = [
        _gram_matrix(layer, cut(left, part), right, weight, bias)
        for part in steps(left.samples, 2 * each * right.prefix.shape[0])
    ]
    return joined(parts, left.prefix.new_zeros(0, right.samples))


def _gram_matrix(layer: Layer, left: Factored, right: Factored, weight: bool, bias: bool) -> Tensor:
    products = _products(layer, left, right, weight, bias)
    by_left = products if single(left) else sum_by_sample(left, products)
    return by_left if single(right) else sum_by_sample(right, by_left.T).T


def _products(layer: Layer, left: Factored, right: Factored, weight: bool, bias: bool) -> Tensor:
    """(a·a')(b·b') of every position on the left and on the right, summed over groups: [p, q]."""
    if not weight:
        return left.prefix @ right.prefix.T
    if layer.kind == "embedding":
        same = left.suffix.unsqueeze(1) == right.suffix
        return (left.prefix @ right.prefix.T).mul_(same)
    if layer.groups == 1:
        return (left.prefix @ right.prefix.T).mul_((left.suffix @ right.suffix.T).add_(int(bias)))
    b, b_right = (by_group(block.prefix, layer.groups).transpose(0, 1) for block in (left, right))
    a, a_right = (by_group(block.suffix, layer.groups).transpose(0, 1) for block in (left, right))
    return ((b @ b_right.mT) * (a @ a_right.mT + int(bias))).sum(0)
