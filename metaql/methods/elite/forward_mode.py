"""Derivatives along a direction of the parameters, by dual numbers: exact for whatever torch can push them through."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class NoForwardModeError(Exception):
    """The scores can't be differentiated in forward mode; the text says why."""


Score = Callable[[nn.Module, Tensor], Tensor]


class _Scored(nn.Module):
    """A module whose output is the score, so that functional_call can swap parameters beneath a score function."""

    def __init__(self, module: nn.Module, score: Score) -> None:
        super().__init__()
        self.module = module
        self.score = score

    def forward(self, inputs: Tensor) -> Tensor:
        return self.score(self.module, inputs)


def along_forward(
    module: nn.Module, score: Score, inputs: Tensor, direction: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """The scores [n], with a graph if gradients are enabled, and their derivatives [n] along the direction.

    NoForwardModeError if torch has no forward mode for something in the module.
    """
    try:
        return _dual(module, score, inputs, direction)
    except (NotImplementedError, RuntimeError):
        # mkldnn's LSTM has no forward mode; the plain one has.
        try:
            with _without_mkldnn():
                return _dual(module, score, inputs, direction)
        except (NotImplementedError, RuntimeError) as error:
            raise NoForwardModeError(str(error)) from error


def _dual(module: nn.Module, score: Score, inputs: Tensor, direction: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    _load()
    parameters = dict(module.named_parameters())
    # Fused attention has no forward mode.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = {
            f"module.{name}": forward_ad.make_dual(parameters[name], tangent.to(parameters[name]))
            for name, tangent in direction.items()
        }
        unpacked = forward_ad.unpack_dual(functional_call(_Scored(module, score), duals, (inputs,)))
        scores, derivatives = unpacked.primal, unpacked.tangent
    return scores, torch.zeros_like(scores) if derivatives is None else derivatives.detach()


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    with warnings.catch_warnings():
        # Of other flags, which are set to what they are.
        warnings.simplefilter("ignore", UserWarning)
        flags = torch.backends.mkldnn.flags(enabled=False)
        with flags:
            yield


@cache
def _load() -> None:
    """Makes the first dual number, for which torch loads what it says itself is deprecated."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(1), torch.zeros(1))
