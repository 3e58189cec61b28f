"""What is added to a curvature's eigenvalues before they are inverted."""

from __future__ import annotations

import math

from torch import Tensor

from metaql.errors import QueryError

# Of a layer's mean eigenvalue: the rule of Grosse et al. 2023, and of kronfluence where it is given None.
SHARE = 0.1


def damping_of(eigenvalues: Tensor, given: float | None) -> float:
    """The number that is added to a layer's eigenvalues: the one given, else a tenth of their mean."""
    return SHARE * float(eigenvalues.mean()) if given is None else require_positive(given)


def require_positive(given: float) -> float:
    """The damping; QueryError unless it is a positive number."""
    if not (math.isfinite(given) and given > 0):
        raise QueryError(
            f"damping := {given} is not a positive number: it is added to the curvature's eigenvalues, some of which"
            " are zero, before they are inverted. Leave it out for a tenth of each layer's mean eigenvalue"
        )
    return given


def inverse(eigenvalues: Tensor, given: float | None) -> Tensor:
    """1 / (eigenvalue + damping). All zero where the eigenvalues are, if no damping is given.

    Of a layer that no loss depends on, the gradients are zero too, and whatever they are multiplied with.
    """
    damped = eigenvalues + damping_of(eigenvalues, given)
    return damped.reciprocal().masked_fill(damped <= 0, 0.0)
