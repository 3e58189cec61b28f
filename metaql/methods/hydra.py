"""HYDRA (Chen et al., AAAI 2021): how much each recorded step of a training run moved the weights that it ended with.

Without the Hessian, the derivative of the final weights by a sample's share in the training loss is linear in the
gradients of the steps that the sample was part of (the paper's Algorithm 1). So what a sample adds to a test loss is

    influence(i) = Σ_t weight_t ⟨g_{t,i}, ∇L_test(w_T)⟩

with numbers ``weight_t`` that the optimizer's settings alone decide. They come from one sweep backwards over the
updates. With a and b the adjoints of a weight and of its momentum buffer, h the adjoint of the gradient that SGD is
given, and lr η, momentum μ, dampening d, weight decay λ:

    q = b - η a (μ if nesterov, else 1);    h = κ q - (η a if nesterov, else 0);    κ = 1 if fresh, else 1 - d
    a ← a + λ h;                            b ← 0 if fresh, else μ q

from a = 1 and b = 0 after the last update; where μ = 0, h = -η a and b stays. Positive helps: more of the sample would
have lowered the test loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from metaql.errors import QueryError

SGD = "SGD"


@dataclass(frozen=True)
class Pass:
    """A forward and backward pass, or an update without one, as a row of ``steps`` describes it for one group."""

    step: int | None
    optimizer: str | None
    update: int | None
    learning_rate: float
    momentum: float | None
    dampening: float | None
    weight_decay: float | None
    nesterov: bool | None
    maximize: bool | None
    buffer_fresh: bool | None
    sample_factor: float | None
    gradient_factor: float | None


def step_weights(passes: Sequence[Pass], updates: int) -> list[float]:
    """The weight of each pass, in the weights that so many updates led to; 0 for gradients that no update used.

    ``passes`` are those of one parameter group, in any order. QueryError where what is known of them does not say
    what the update was.
    """
    used = [each for each in passes if each.update is not None and each.update <= updates]
    _require_known(used)
    adjoints = _adjoints({each.update: each for each in used if each.update is not None})
    return [_weight(each, adjoints) for each in passes]


def _adjoints(updates: dict[int, Pass]) -> dict[int, float]:
    """For each update, what the last weights gain from a unit of the gradient that SGD was given."""
    found = {}
    a, b = 1.0, 0.0
    for number in sorted(updates, reverse=True):
        settings = updates[number]
        momentum = settings.momentum or 0.0
        step = settings.learning_rate * a
        if momentum == 0:
            # A buffer that is there stays as it is.
            h = -step
        else:
            q = b - step * (momentum if settings.nesterov else 1.0)
            fresh = bool(settings.buffer_fresh)
            h = (1.0 if fresh else 1.0 - (settings.dampening or 0.0)) * q - (step if settings.nesterov else 0.0)
            b = 0.0 if fresh else momentum * q
        found[number] = h
        a += (settings.weight_decay or 0.0) * h
    return found


def _weight(one: Pass, adjoints: dict[int, float]) -> float:
    if one.step is None or one.update not in adjoints:
        return 0.0
    assert one.sample_factor is not None
    assert one.gradient_factor is not None
    sign = 1.0 if one.maximize else -1.0
    return sign * adjoints[one.update] * one.sample_factor * one.gradient_factor


def require_updates(passes: Iterable[Pass]) -> None:
    """QueryError if no pass of any group went into an update."""
    if all(each.update is None for each in passes):
        raise QueryError(
            "no recorded step went into an update of the optimizer that recorder.step was given, so no step moved the "
            "weights. Pass the optimizer whose step() the training loop calls"
        )


def _require_known(used: Sequence[Pass]) -> None:
    others = sorted({each.optimizer or "an unknown optimizer" for each in used} - {SGD})
    if others:
        raise QueryError(
            f"HYDRA is known for one torch.optim.SGD, and this run was trained with {' and '.join(others)}: its "
            "updates are no sum of gradients with known weights. tracin(…) takes any optimizer"
        )
    if apart := [each.step for each in used if each.buffer_fresh is None and (each.momentum or each.weight_decay)]:
        raise QueryError(
            f"at {_steps(apart)} some parameters of a group had a gradient or a momentum buffer and others had none, "
            "so that they were not updated alike: give them parameter groups of their own"
        )
    require_factors(used)


def require_factors(passes: Sequence[Pass]) -> None:
    """QueryError unless it is known with what factor each sample's gradient went into the update."""
    for missing, text in (
        (
            [each for each in passes if each.step is not None and each.sample_factor is None],
            "the samples had different factors in the loss at {}, which are not kept: this needs batches with "
            "reduction='mean', 'sum' or one factor for all samples, and ranks with batches of one size",
        ),
        (
            [each for each in passes if each.step is not None and each.gradient_factor is None],
            "something other than a common factor changed the gradients between the backward pass and the update at "
            "{} (clip_grad_value_, noise, a pass that was not recorded): their part in the update is not known",
        ),
    ):
        if missing:
            raise QueryError(text.format(_steps(each.step for each in missing)))


def _steps(numbers: Iterable[int | None]) -> str:
    known = sorted({number for number in numbers if number is not None})
    shown = ", ".join(map(str, known[:3])) + (f" and {len(known) - 3} more" if len(known) > 3 else "")
    return f"step {shown}" if len(known) == 1 else f"steps {shown}" if known else "an update that was not recorded"
