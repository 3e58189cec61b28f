"""Inner products of two blocks, by the cheapest of the exact ways that their layouts allow.

The choice between factors and contraction is by floating point operations, with S and S' positions a sample:

    Gram, a pair        S·S'·(D_in + D_out)
    contract, a pair    S·D_in·D_out, and S'·D_in·D_out once for each right sample that is laid out
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaql.storage.blocks import Block, Factored, Full, lay_out
from metaql.storage.schema import Layer
from metaql.udfs.contract import contract, contract_pairs, widths
from metaql.udfs.gram import gram_matrix, gram_pairs
from metaql.udfs.patterns import Term
from metaql.udfs.slices import columns, cut, joined, move, padded, positions, row_dots, steps

# Laid-out gradients of one step: more of them than the caches hold, since each is read once only.
LAID_OUT_BUDGET = 32 << 20


@dataclass(frozen=True)
class _Parts:
    """Which parameters of a factored layer count."""

    layer: Layer
    weight: bool
    bias: bool


def pairs(term: Term, left: Block, right: Block) -> Tensor:
    """The inner product of each left sample with the right sample beside it: [n]."""
    left, right = _alike(left, right)
    parts = _factored_parts(term)
    if parts is None or (isinstance(left, Full) and isinstance(right, Full)):
        return row_dots(*_laid_out(term, left, right))
    if isinstance(left, Full):
        left, right = right, left
    assert isinstance(left, Factored)
    if isinstance(right, Factored):
        if _gram_is_cheaper(parts.layer, left, right, left.samples, left.samples):
            return gram_pairs(parts.layer, left, right, parts.weight, parts.bias)
        return _contract_pairs(parts, left, right)
    return contract_pairs(parts.layer, left, right.gradient, parts.weight, parts.bias)


def matrix(term: Term, left: Block, right: Block) -> Tensor:
    """The inner product of every left with every right sample: [l, r]."""
    left, right = _alike(left, right)
    parts = _factored_parts(term)
    if parts is None or (isinstance(left, Full) and isinstance(right, Full)):
        laid_out, other = _laid_out(term, left, right)
        return laid_out @ other.T
    if isinstance(left, Full):
        assert isinstance(right, Factored)
        return _contract_matrix(parts, right, left).T
    if isinstance(right, Factored) and _gram_is_cheaper(
        parts.layer, left, right, left.samples * right.samples, right.samples
    ):
        return gram_matrix(parts.layer, left, right, parts.weight, parts.bias)
    return _contract_matrix(parts, left, right)


def _alike(left: Block, right: Block) -> tuple[Block, Block]:
    """Both in the wider of their dtypes."""
    a, b = (block.prefix if isinstance(block, Factored) else block.gradient for block in (left, right))
    if a.dtype == b.dtype:
        return left, right
    dtype = torch.promote_types(a.dtype, b.dtype)
    return move(left, a.device, dtype), move(right, b.device, dtype)


def _factored_parts(term: Term) -> _Parts | None:
    """The parameters as a factored layer's, or None when the two layers can't be multiplied by factors."""
    left, right = term.left, term.right
    alike = left is right or (
        (left.kind, left.groups, left.parameters[0].shape) == (right.kind, right.groups, right.parameters[0].shape)
    )
    if not alike or left.input_width is None or any(place != other for place, other in term.places):
        return None
    places = [place for place, _ in term.places]
    return _Parts(left, 0 in places, 1 in places)


def _laid_out(term: Term, left: Block, right: Block) -> tuple[Tensor, Tensor]:
    places, others = zip(*term.places, strict=True)
    return (
        columns(term.left, places, _restored(term.left, left)),
        columns(term.right, others, _restored(term.right, right)),
    )


def _restored(layer: Layer, block: Block) -> Tensor:
    # Padding first: laying out samples of different lengths is a loop over them.
    return lay_out(layer, padded(block) if isinstance(block, Factored) else block)


def _gram_is_cheaper(layer: Layer, left: Factored, right: Factored, products: int, laid_out: int) -> bool:
    i, o = widths(layer)
    s, t = positions(left), positions(right)
    if layer.kind == "embedding":
        # Contracting costs a position only its own row, but laying out fills the whole table.
        return products * s * t * o <= products * s * o + laid_out * layer.width
    gram = products * s * t * (layer.groups * i + o)
    return gram <= products * s * o * i + laid_out * t * o * i


def _contract_pairs(parts: _Parts, left: Factored, right: Factored) -> Tensor:
    results = [
        contract_pairs(parts.layer, cut(left, part), _restored(parts.layer, cut(right, part)), parts.weight, parts.bias)
        for part in steps(left.samples, parts.layer.width, LAID_OUT_BUDGET)
    ]
    return joined(results, left.prefix.new_zeros(0))


def _contract_matrix(parts: _Parts, left: Factored, right: Block) -> Tensor:
    """Each right sample laid out, and all left samples contracted with it."""
    samples = right.samples
    scores = [
        contract(parts.layer, left, gradient, parts.weight, parts.bias)
        for part in steps(samples, parts.layer.width, LAID_OUT_BUDGET)
        for gradient in _restored(parts.layer, _slice(right, part))
    ]
    if not scores:
        return torch.zeros(left.samples, 0, dtype=left.prefix.dtype, device=left.prefix.device)
    return scores[0].unsqueeze(1) if len(scores) == 1 else torch.stack(scores, dim=1)


def _slice(block: Block, part: slice) -> Block:
    return Full(block.gradient[part]) if isinstance(block, Full) else cut(block, part)
