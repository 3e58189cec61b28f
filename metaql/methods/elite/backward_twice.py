"""Derivatives along a direction of the parameters by two backward passes: slow, and for what nothing else can do.

The gradient of Σ v_i Ω_i is linear in v, so the gradient with respect to v of its product with G is ⟨∇Ω_i, G⟩.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metaql.errors import QueryError
from metaql.methods.elite.forward_mode import Score


def along_backward(
    module: nn.Module, score: Score, inputs: Tensor, direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The scores [n], with a graph, and their derivatives [n] along the direction.

    QueryError if torch can't differentiate the gradient.
    """
    parameters = dict(module.named_parameters())
    try:
        scores = score(module, inputs)
        shares = torch.ones_like(scores, requires_grad=True)
        parts = [parameters[name] for name in direction]
        found = torch.autograd.grad(scores, parts, shares, create_graph=True, allow_unused=True)
        pairs = zip(found, direction.values(), strict=True)
        product = sum((own * other).sum() for own, other in pairs if own is not None) + 0 * shares.sum()
        return scores, torch.autograd.grad(product, shares, retain_graph=True)[0]
    except (NotImplementedError, RuntimeError) as error:
        raise QueryError(
            f"the meta-gradient of this {type(module).__name__} can't be had: its samples' gradients have no factors, "
            "and torch can differentiate it neither in forward mode nor twice "
            f"({str(error).splitlines()[0]}). Replace the operation that is named, or use a network of linear layers, "
            "convolutions and norms"
        ) from error
