"""A few numbers of each gradient, by which is seen what happened to all of them between two moments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

# So many numbers of each gradient.
_SHOWN = 1024
_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class GradientSample:
    """Numbers of the gradients at some moment, float64 on the CPU, by parameter.

    ``places`` says which numbers, of those gradients whose evenly spread ones are all zero. ``rounding`` is by how much
    they may differ, relatively, after all were multiplied with a number.
    """

    values: dict[str, Tensor]
    places: dict[str, Tensor]
    rounding: float

    @classmethod
    def of(cls, parameters: Mapping[str, nn.Parameter]) -> Self | None:
        """Of these parameters' gradients; None where there are none, or zeros alone."""
        flat = _flat(parameters)
        values, places = {name: _spread(each) for name, each in flat.items()}, {}
        for name, each in flat.items():
            if not bool(values[name].any()):
                # A table of which few rows were looked up.
                places[name] = each.nonzero().flatten()[:_SHOWN]
                values[name] = _copy(each[places[name]])
        if not any(bool(each.any()) for each in values.values()):
            return None
        return cls(values, places, max(_ROUNDING.get(each.dtype, 1e-3) for each in flat.values()))

    def factor(self, parameters: Mapping[str, nn.Parameter]) -> float | None:
        """By what all gradients were multiplied since; None where something else happened to them."""
        flat = _flat(parameters)
        if any(name not in flat and bool(each.any()) for name, each in self.values.items()):
            return None
        if any(name not in self.values and bool(each.any()) for name, each in flat.items()):
            return None
        names = [name for name in self.values if name in flat]
        now = [_copy(flat[name][self.places[name]]) if name in self.places else _spread(flat[name]) for name in names]
        if any(len(one) != len(self.values[name]) for name, one in zip(names, now, strict=True)):
            return None
        before, after = torch.cat([self.values[name] for name in names]), torch.cat(now)
        if torch.equal(before, after):
            return 1.0
        ratio = float(before @ after / (before @ before))
        apart = float((after - ratio * before).norm())
        return ratio if apart <= self.rounding * float(after.norm()) else None


def _flat(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    given = {name: each.grad.detach() for name, each in parameters.items() if each.grad is not None}
    return {name: (each.coalesce().values() if each.is_sparse else each).flatten() for name, each in given.items()}


def _spread(gradient: Tensor) -> Tensor:
    """Numbers from all over it."""
    return _copy(gradient[:: max(len(gradient) // _SHOWN, 1)])


def _copy(numbers: Tensor) -> Tensor:
    return numbers.to("cpu", torch.float64, copy=True)
