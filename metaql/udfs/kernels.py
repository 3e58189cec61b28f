"""Inner products of two blocks, by the cheapest of the exact ways that their layouts allow.

The choice between factors and contraction is by floating point operations, with S and S' positions a sample:

    Gram, a pair        S·S'·(D_in + D_out)
    contract, a pair    S·D_in·D_out, and S'·D_in·D_out once for each right sample that is laid out
"""

from __future__ import annotations

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


def pairs(term: Term, left: Block, right: Block) -> Tensor:
    """The inner product of each left sample with the right sample beside it: [n]."""
    left, right = _alike(left, right)
    if not term.by_factors or (isinstance(left, Full) and isinstance(right, Full)):
        return row_dots(*_laid_out(term, left, right))
    if isinstance(left, Full):
        left, right = right, left
    assert isinstance(left, Factored)
    if isinstance(right, Factored):
        if _gram_is_cheaper(term.left, left, right, left.samples, left.samples):
            return gram_pairs(term.left, left, right, term.weight, term.bias)
        return _contract_pairs(term, left, right)
    return contract_pairs(term.left, left, right.gradient, term.weight, term.bias)


def matrix(term: Term, left: Block, right: Block) -> Tensor:
    """The inner product of every left with every right sample: [l, r]."""
    left, right = _alike(left, right)
    if not term.by_factors or (isinstance(left, Full) and isinstance(right, Full)):
        laid_out, other = _laid_out(term, left, right)
        return laid_out @ other.T
    if isinstance(left, Full):
        assert isinstance(right, Factored)
        return _contract_matrix(term, right, left).T
    if isinstance(right, Factored) and _gram_is_cheaper(
        term.left, left, right, left.samples * right.samples, right.samples
    ):
        return gram_matrix(term.left, left, right, term.weight, term.bias)
    return _contract_matrix(term, left, right)


def _alike(left: Block, right: Block) -> tuple[Block, Block]:
    """Both in the wider of their dtypes."""
    a, b = (block.prefix if isinstance(block, Factored) else block.gradient for block in (left, right))
    if a.dtype == b.dtype:
        return left, right
    dtype = torch.promote_types(a.dtype, b.dtype)
    return move(left, a.device, dtype), move(right, b.device, dtype)


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


def _contract_pairs(term: Term, left: Factored, right: Factored) -> Tensor:
    results = [
        contract_pairs(term.left, cut(left, part), _restored(term.left, cut(right, part)), term.weight, term.bias)
        for part in steps(left.samples, term.left.width, LAID_OUT_BUDGET)
    ]
    return joined(results, left.prefix.new_zeros(0))


def _contract_matrix(term: Term, left: Factored, right: Block) -> Tensor:
    """Each right sample laid out, and all left samples contracted with it."""
    if right.samples == 1:
        return contract(term.left, left, _restored(term.left, right)[0], term.weight, term.bias).unsqueeze(1)
    scores = [
        contract(term.left, left, gradient, term.weight, term.bias)
        for part in steps(right.samples, term.left.width, LAID_OUT_BUDGET)
        for gradient in _restored(term.left, _slice(right, part))
    ]
    return torch.stack(scores, dim=1) if scores else left.prefix.new_zeros(left.samples, 0)


def _slice(block: Block, part: slice) -> Block:
    return Full(block.gradient[part]) if isinstance(block, Full) else cut(block, part)
