"""ALICE's meta-gradients: ⟨∇Ω(x_i), G⟩ for every sample of a batch and one direction G, without a double backward.

Three ways, all exact. *Factored*: one forward and one backward pass, whose products with G are taken layer by layer
(``factored.py``); for networks whose trainable parameters are all used in linear layers, convolutions and affine norms,
and whose samples don't mix. *Forward mode*: ⟨∇Ω_i, G⟩ is the derivative of Ω_i along G, which one forward pass with
dual numbers gives (``forward_mode.py``); for every parameter that torch's forward mode supports, and exact with batch
norm in training mode, where Ω_i depends on the whole batch. *Two backward passes* for the rest (``backward_twice.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from metaql.methods.elite.backward_twice import along_backward
from metaql.methods.elite.factored import (
    TOLERANCE,
    USUAL_TOLERANCE,
    FactoredPass,
    NoFactorsError,
    along,
    require_own_gradients,
)
from metaql.methods.elite.forward_mode import NoForwardModeError, Score, along_forward

Along = Callable[[nn.Module, Score, Tensor, Mapping[str, Tensor]], tuple[Tensor, Tensor]]


@torch.enable_grad()
def meta_gradients(module: nn.Module, score: Score, inputs: Tensor, direction: Mapping[str, Tensor]) -> Tensor:
    """⟨∇Ω(x_i), G⟩ [n] of the scores ``score(module, inputs)`` [n], for G a tensor for each parameter's name.

    Parameters that are not named count as zero. Factored where that is exact, else by forward mode, else by two
    backward passes; QueryError if torch can't do that either. The module's mode is taken as it is, its buffers stay as
    they are.
    """
    parameters = trainable(module)
    with kept_buffers(module):
        if why_not_factored(module, score, inputs) is None:
            return products_from_factors(lambda x: score(module, x), parameters, inputs, direction)
    along_any = how_along(module, score, inputs)
    with kept_buffers(module):
        return along_any(module, score, inputs, direction)[1]


def products_from_factors(
    score: Callable[[Tensor], Tensor], parameters: Mapping[str, Tensor], inputs: Tensor, direction: Mapping[str, Tensor]
) -> Tensor:
    """⟨∇Ω(x_i), G⟩ [n] where nothing keeps the scores from having factors."""
    taken = FactoredPass(score, parameters, inputs)
    (factors,) = taken.backward(torch.ones_like(taken.scores), [len(inputs)])
    return along(factors, direction, taken.scores)


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; a tied one once."""
    return {name: each for name, each in module.named_parameters() if each.requires_grad}


def why_not_factored(module: nn.Module, score: Score, inputs: Tensor) -> str | None:
    """What keeps these scores' gradients from being had by factors; None if nothing does."""
    try:
        with torch.random.fork_rng(devices=[]), kept_buffers(module):
            require_own_gradients(lambda x: score(module, x), trainable(module), inputs)
    except NoFactorsError as reason:
        return str(reason)
    return None


def how_along(module: nn.Module, score: Score, inputs: Tensor) -> Along:
    """Forward mode where these inputs show that it is exact, else two backward passes.

    Forward mode does not see what autograd is told to leave out (``torch.no_grad`` within the module), nor parameters
    that the score has hold of beside the module.
    """
    with torch.random.fork_rng(devices=[]), kept_buffers(module):
        try:
            exact = _is_exact(module, score, inputs)
        except NoForwardModeError:
            exact = False
    return along_forward if exact else along_backward


def _is_exact(module: nn.Module, score: Score, inputs: Tensor) -> bool:
    """Whether forward mode and autograd agree on a random mixture of the scores along a random direction."""
    generator = torch.Generator().manual_seed(0)
    parameters = trainable(module)
    direction = {name: torch.randn(each.shape, generator=generator).to(each) for name, each in parameters.items()}
    scores, products = along_forward(module, score, inputs, direction)
    mixture = torch.rand(len(inputs), generator=generator).add(0.5).to(scores)
    truth = torch.autograd.grad(scores, list(parameters.values()), mixture, allow_unused=True)
    terms = [own * other for own, other in zip(truth, direction.values(), strict=True) if own is not None]
    expected = sum(float(each.sum()) for each in terms)
    # Sums whose terms cancel are as inexact as their terms.
    size = sum(float(each.abs().sum()) for each in terms)
    return abs(float(mixture @ products) - expected) <= TOLERANCE.get(scores.dtype, USUAL_TOLERANCE) * size


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Puts running statistics back to what they were."""
    before = {name: each.clone() for name, each in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, each in module.named_buffers():
                each.copy_(before[name])
