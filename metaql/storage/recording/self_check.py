"""Compares per-sample gradients with plain autograd on single samples, parameter by parameter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from metaql.errors import ModelStateError

# Relative differences that are still rounding. A wrong or missing part is seen to differ by 1e-2 and more.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
# A gradient that is zero in exact arithmetic is noise in floating point; noise is measured against all parameters.
NOISE = 1e-3


def coarsest(values: Tensor) -> torch.dtype:
    """The coarsest floating-point type that the gradients of values pass through on their way back."""
    found, waiting, seen = {values.dtype}, [values.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.update(each.dtype for each in getattr(node, "_input_metadata", ()) if each is not None)
        waiting += [each for each, _ in node.next_functions]
    return max((each for each in found if each in TOLERANCE), key=lambda dtype: torch.finfo(dtype).eps)


def disagreeing(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    precision: torch.dtype,
    most: bool = False,
    slack: float = 1.0,
) -> set[str]:
    """The names whose gradients [k, ...] differ by more than rounding in this precision.

    ``most`` lets a minority of the k samples differ: where two ways of computing the same round differently, a
    unit of a piecewise linear network may fall on the other side of its kink, and that sample's gradient jumps.
    ``slack`` widens the tolerance for the same reason, where gradients are sums over samples.
    """
    tolerance = slack * TOLERANCE[precision]
    total = _norms(list(expected.values()))
    wrong = set()
    for name, gradient in got.items():
        reference = _rows(expected[name])
        difference = (_rows(gradient) - reference).norm(dim=1)
        close = difference <= tolerance * (reference.norm(dim=1) + NOISE * total)
        if not bool(close.all()) and not (most and int(close.sum()) * 2 > len(close)):
            wrong.add(name)
    return wrong


def exceeds_rounding(difference: Tensor, magnitudes: Tensor, precision: torch.dtype) -> bool:
    """Whether sums differ by more than rounding of terms whose absolute values add up to ``magnitudes``."""
    most = min(100 * torch.finfo(precision).eps, TOLERANCE[precision])
    return bool(difference.double().norm() > most * magnitudes.double().norm())


def shares(gradients: Mapping[str, Tensor]) -> dict[str, float]:
    """Each parameter's share of the squared norm of all gradients."""
    squares = {name: float(gradient.double().square().sum()) for name, gradient in gradients.items()}
    total = sum(squares.values())
    return {name: square / total if total > 0 else 0.0 for name, square in squares.items()}


def require_same_losses(again: Tensor, together: Tensor, precision: torch.dtype, how: str = "on its own") -> None:
    """Raises if a sample's loss depends on the batch it is in, or differs when it is computed again."""
    scale = together.abs().mean() + together.abs()
    difference = (again.double() - together.double()).abs()
    if bool((difference <= TOLERANCE[precision] * scale).all()):
        return
    worst = int(difference.argmax())
    raise ModelStateError(
        f"A sample's loss {how} is not its loss within the batch ({again[worst].item():.6g} against "
        f"{together[worst].item():.6g} for one of them), so its gradient is not its own. "
        "Causes: losses that divide by the batch (use reduction='none'), dropout or other randomness left on "
        "(call model.eval(), and pass training=self.training to F.dropout), statistics over the batch, or tensors "
        "in whose first dimension the samples are not (pass batches of one sample then)."
    )


def _norms(gradients: list[Tensor]) -> Tensor:
    squares = [_rows(gradient).square().sum(1) for gradient in gradients]
    return torch.stack(squares).sum(0).sqrt() if squares else torch.zeros(1, dtype=torch.float64)


def _rows(gradients: Tensor) -> Tensor:
    """[k, ...] => float64 [k, elements], also for parameters that are a single number."""
    return gradients.reshape(len(gradients), -1).double()
