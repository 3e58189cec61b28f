"""Inner products of two blocks, by the cheapest of the exact ways that their layouts allow (``costs.py``)."""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.storage.blocks import Block, Factors, Full, cut, lay_out
from metaql.storage.schema import Layer
from metaql.udfs import costs
from metaql.udfs.contract import contract_matrix, contract_pairs
from metaql.udfs.costs import FULL, GRAM, SHIPPED, Constants, Side
from metaql.udfs.gram import gram_matrix, gram_pairs
from metaql.udfs.patterns import Term
from metaql.udfs.slices import columns, joined, move, numbers, padded, positions, row_dots, steps

# Laid-out gradients of one step: more of them than the caches hold, since each is read once only.
LAID_OUT_BUDGET = 32 << 20
# Columns of laid-out gradients that are multiplied at a time: float32 sums over many more of them lose digits.
STRETCH = 1 << 14


def pairs(term: Term, left: Block, right: Block, machine: Constants = SHIPPED) -> Tensor:
    """The inner product of each left sample with the right sample beside it: [n]."""
    left, right = _alike(left, right)
    sides = side(left), side(right)
    way = FULL
    if _has_factors(term, *sides):
        ways = costs.pairs(machine, term.left, left.samples, sides[0].positions, sides[1].positions)
        way = machine.choose(ways)
    if way == FULL:
        return _full_pairs(term, left, right)
    if isinstance(left, Full):
        left, right = right, left
    assert not isinstance(left, Full)
    if way == GRAM:
        assert not isinstance(right, Full)
        return gram_pairs(term.left, left, right, term.weight, term.bias)
    return _contract_pairs(term, left, right)


def matrix(term: Term, left: Block, right: Block, machine: Constants = SHIPPED) -> Tensor:
    """The inner product of every left with every right sample: [l, r]."""
    left, right = _alike(left, right)
    way = FULL
    if _has_factors(term, side(left), side(right)):
        way = machine.choose(costs.matrix(machine, term.left, side(left), side(right)))
    if way == FULL:
        return _full_matrix(term, left, right)
    if isinstance(left, Full):
        assert not isinstance(right, Full)
        return _contract_matrix(term, right, left).T
    if way == GRAM:
        assert not isinstance(right, Full)
        return gram_matrix(term.left, left, right, term.weight, term.bias)
    return _contract_matrix(term, left, right)


def side(block: Block) -> Side:
    """How large a block is."""
    return Side(block.samples, None if isinstance(block, Full) else positions(block))


def restored(layer: Layer, block: Block, out: Tensor | None = None) -> Tensor:
    """The gradients themselves, [n, layer.width]; in ``out`` where there is one."""
    # Padding first: laying out samples of different lengths is a loop over them.
    return lay_out(layer, block if isinstance(block, Full) else block.each(padded), out)


def _has_factors(term: Term, left: Side, right: Side) -> bool:
    """Whether there is anything to choose."""
    return term.by_factors and not (left.positions is None and right.positions is None)


def _alike(left: Block, right: Block) -> tuple[Block, Block]:
    """Both in the wider of their dtypes."""
    a, b = numbers(left), numbers(right)
    if a.dtype == b.dtype:
        return left, right
    dtype = torch.promote_types(a.dtype, b.dtype)
    return move(left, a.device, dtype), move(right, b.device, dtype)


def _full_pairs(term: Term, left: Block, right: Block) -> Tensor:
    own, other = _shared_columns(term)
    results = [
        row_dots(
            columns(term.left, own, restored(term.left, some(left, part))),
            columns(term.right, other, restored(term.right, some(right, part))),
        )
        for part in _laid_out_steps(term, left, right)
    ]
    return joined(results, numbers(left).new_zeros(0))


def _full_matrix(term: Term, left: Block, right: Block) -> Tensor:
    own, other = _shared_columns(term)
    result = numbers(left).new_zeros(left.samples, right.samples)
    for across in _laid_out_steps(term, right):
        others = columns(term.right, other, restored(term.right, some(right, across)))
        for down in _laid_out_steps(term, left):
            ours = columns(term.left, own, restored(term.left, some(left, down)))
            _add_products(ours, others, result[down, across])
    return result


def _add_products(left: Tensor, right: Tensor, result: Tensor) -> None:
    """Adds every row on the left times every one on the right."""
    for begin in range(0, left.shape[1], STRETCH):
        part = slice(begin, begin + STRETCH)
        result.addmm_(left[:, part], right[:, part].T)


def _shared_columns(term: Term) -> tuple[tuple[int, ...], tuple[int, ...]]:
    own, other = zip(*term.places, strict=True)
    return own, other


def _laid_out_steps(term: Term, *blocks: Block) -> list[slice]:
    """Samples that are laid out at a time; all, where all blocks already are."""
    if all(isinstance(block, Full) for block in blocks):
        return [slice(0, blocks[0].samples)]
    return list(steps(blocks[0].samples, term.left.width, LAID_OUT_BUDGET))


def _contract_pairs(term: Term, left: Factors, right: Block) -> Tensor:
    results = [
        contract_pairs(term.left, _some(left, part), restored(term.left, some(right, part)), term.weight, term.bias)
        for part in _laid_out_steps(term, right)
    ]
    return joined(results, numbers(left).new_zeros(0))


def _contract_matrix(term: Term, left: Factors, right: Block) -> Tensor:
    """The right samples laid out, and all left samples contracted with them."""
    scores = [
        contract_matrix(term.left, left, restored(term.left, some(right, part)), term.weight, term.bias)
        for part in _laid_out_steps(term, right)
    ]
    return torch.cat(scores, dim=1) if scores else numbers(left).new_zeros(left.samples, 0)


def some(block: Block, part: slice) -> Block:
    """A slice of a block's samples."""
    return Full(block.gradient[part]) if isinstance(block, Full) else _some(block, part)


def _some(block: Factors, part: slice) -> Factors:
    return block.each(lambda one: cut(one, part))
