"""Inner products of factored gradients from their factors alone.

With suffixes a, prefixes b, positions s of the one sample and t of the other, and groups g:

    ⟨W, W'⟩ = Σ_g Σ_s Σ_t (a_gs·a'_gt)(b_gs·b'_gt)        ⟨bias, bias'⟩ = Σ_g Σ_s Σ_t b_gs·b'_gt

so a bias adds 1 to the first factor. For an embedding a is one-hot: a·a' is 1 where both positions looked up
the same row of the table. Of a tied layer each part is multiplied
with each: a projection's position with a table's row r gives ⟨b aᵀ, e_r b'ᵀ⟩ = b[r] (a·b').

Letters: n pairs, l and r samples on either side, p and q all their positions, i one group's input width, o one
group's output width.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from metaql.storage.blocks import Factored, Factors, cut, split, sum_by_sample
from metaql.storage.schema import Layer
from metaql.udfs.slices import by_group, joined, longest, padded, row_dots, single, steps, summed


def gram_pairs(layer: Layer, left: Factors, right: Factors, weight: bool, bias: bool) -> Tensor:
    """The inner product of each left sample with the right sample beside it: [n]."""
    terms = product(split(layer, left), split(layer, right))
    return summed([_pairs(one, a, other, b, weight, bias) for (one, a), (other, b) in terms])


def _pairs(one: Layer, left: Factored, other: Layer, right: Factored, weight: bool, bias: bool) -> Tensor:
    parts = []
    for part in steps(left.samples, 2 * one.groups * longest(left) * longest(right)):
        a, b = padded(cut(left, part)), padded(cut(right, part))
        if one.kind == other.kind:
            parts.append(_gram_pairs(one, a, b, weight, bias))
        else:
            parts.append(_crossed_pairs(a, b) if other.kind == "embedding" else _crossed_pairs(b, a))
    return joined(parts, left.prefix.new_zeros(0))


def _crossed_pairs(projection: Factored, table: Factored) -> Tensor:
    n, v = projection.samples, projection.prefix.shape[1]
    rows = table.suffix.reshape(n, 1, len(table.suffix) // max(n, 1))
    prefix = projection.prefix.reshape(n, len(projection.prefix) // max(n, 1), v)
    picked = prefix.gather(2, rows.expand(n, prefix.shape[1], rows.shape[2]))
    return (_dots(projection.suffix, table.prefix, n, 1).squeeze(1) * picked).sum((1, 2))


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


def gram_matrix(layer: Layer, left: Factors, right: Factors, weight: bool, bias: bool) -> Tensor:
    """The inner product of every left with every right sample: [l, r]."""
    terms = product(split(layer, left), split(layer, right))
    return summed([_matrix(one, a, other, b, weight, bias) for (one, a), (other, b) in terms])


def _matrix(one: Layer, left: Factored, other: Layer, right: Factored, weight: bool, bias: bool) -> Tensor:
    if left.samples == 0 or right.samples == 0:
        return left.prefix.new_zeros(left.samples, right.samples)
    each = left.prefix.shape[0] / max(left.samples, 1)
    parts = [
        _gram_matrix(one, cut(left, part), other, right, weight, bias)
        for part in steps(left.samples, 2 * each * right.prefix.shape[0])
    ]
    return joined(parts, left.prefix.new_zeros(0, right.samples))


def _gram_matrix(one: Layer, left: Factored, other: Layer, right: Factored, weight: bool, bias: bool) -> Tensor:
    if one.kind == other.kind:
        products = _products(one, left, right, weight, bias)
    else:
        products = _crossed(left, right) if other.kind == "embedding" else _crossed(right, left).T
    by_left = products if single(left) else sum_by_sample(left, products)
    return by_left if single(right) else sum_by_sample(right, by_left.T).T


def _crossed(projection: Factored, table: Factored) -> Tensor:
    """Every position of a projection with every row looked up: [p, q]."""
    return (projection.suffix @ table.prefix.T).mul_(projection.prefix.index_select(1, table.suffix))


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
