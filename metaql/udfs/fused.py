"""Layers that read the same input, such as a transformer's query, key and value, multiplied as one layer.

Their suffixes are the same, and so one layer has all of their prefixes side by side:

    Σ_layers Σ_s Σ_t (a_s·a'_t)(b_s·b'_t) = Σ_s Σ_t (a_s·a'_t)(Σ_layers b_s·b'_t)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from metaql.storage.blocks import Block, Factored
from metaql.storage.schema import Layer
from metaql.udfs.patterns import Term
from metaql.udfs.rows import Rows


def fused_terms(terms: Sequence[Term], left: Rows, right: Rows) -> list[tuple[Term, ...]]:
    """The terms in their order, those together whose first rows have the same suffixes."""
    groups: list[tuple[Term, ...]] = [(term,) for term in terms[:1]]
    for before, term in pairwise(terms):
        if _may_be_fused(before, term) and _have_the_same_input(before, term, left, right):
            groups[-1] = (*groups[-1], term)
        else:
            groups.append((term,))
    return groups


def _may_be_fused(one: Term, other: Term) -> bool:
    return all(_form(term) == _form(one) and term.by_factors and term.left.kind == "linear" for term in (one, other))


def _form(term: Term) -> tuple[object, ...]:
    """What layers that are fused have in common; only their output widths may differ."""
    layers = ((each.groups, each.input_width, each.dtype, each.has_bias) for each in (term.left, term.right))
    return (term.places, term.left.groups == 1, *layers)


def _have_the_same_input(one: Term, other: Term, left: Rows, right: Rows) -> bool:
    first = slice(0, 1)
    return (
        len(left) > 0
        and len(right) > 0
        and fused_blocks([left.read(one.left, first), left.read(other.left, first)]) is not None
        and fused_blocks([right.read(one.right, first), right.read(other.right, first)]) is not None
    )


def fused_blocks(blocks: Sequence[Block]) -> Block | None:
    """Blocks of the same samples as one; None where their suffixes differ."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    factored = [block for block in blocks if isinstance(block, Factored)]
    if len(factored) < len(blocks) or not all(_is_alike(factored[0], block) for block in factored[1:]):
        return None
    return replace(factored[0], prefix=torch.cat([block.prefix for block in factored], dim=1))


def _is_alike(one: Factored, other: Factored) -> bool:
    if (one.offsets is None) != (other.offsets is None):
        return False
    same_lengths = one.offsets is None or other.offsets is None or torch.equal(one.offsets, other.offsets)
    return same_lengths and torch.equal(one.suffix, other.suffix)


def fused_term(terms: Sequence[Term]) -> Term:
    """The term of the layer that fused blocks are of."""
    if len(terms) == 1:
        return terms[0]
    return replace(terms[0], left=_fused([term.left for term in terms]), right=_fused([term.right for term in terms]))


def _fused(layers: Sequence[Layer]) -> Layer:
    outputs = sum(layer.output_width or 0 for layer in layers)
    parameters = tuple(replace(each, shape=(outputs, *each.shape[1:])) for each in layers[0].parameters)
    return replace(layers[0], parameters=parameters, output_width=outputs)
