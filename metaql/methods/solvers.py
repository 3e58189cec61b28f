"""(H + damping)⁻¹ v from products with H alone: conjugate gradients, LiSSA and Arnoldi.

References for small models, where each takes tens to hundreds of passes over the data for one vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from metaql.errors import QueryError
from metaql.methods.damping import require_positive

CG, LISSA, ARNOLDI = "cg", "lissa", "arnoldi"
# Of |v|: what may be left of the residual.
TOLERANCE = 1e-6


Eigenpairs = tuple[Tensor, Tensor]


class Operator(Protocol):
    """A symmetric matrix that is known by its products."""

    @property
    def sizes(self) -> Sequence[int]:
        """How many samples each of its batches has, over all of which it is a mean."""

    def times(self, vector: Tensor) -> Tensor:
        """Its product with a vector."""

    def times_batch(self, number: int, vector: Tensor) -> Tensor:
        """That of one batch alone."""


def cg(hessian: Operator, vector: Tensor, damping: float, steps: int = 1000, tolerance: float = TOLERANCE) -> Tensor:
    """By conjugate gradients, until the residual is ``tolerance`` of the vector.

    QueryError where H + damping is not positive definite, or after so many ``steps``.
    """
    require_positive(damping)
    solution, residual = torch.zeros_like(vector), vector.clone()
    direction, before = residual.clone(), residual @ residual
    goal = tolerance**2 * before
    for _ in range(steps):
        if before <= goal:
            return solution
        product = hessian.times(direction) + damping * direction
        bend = direction @ product
        if not bend > 0:
            raise QueryError(
                f"'cg' needs a Hessian that is positive definite with its damping of {damping}, and this one is not:"
                f" along some direction it is {float(bend / (direction @ direction)) - damping:.3g}. Choose a damping"
                " that outweighs that, or 'ekfac', which never is negative"
            )
        length = before / bend
        solution, residual = solution + length * direction, residual - length * product
        after = residual @ residual
        direction, before = residual + after / before * direction, after
    if before <= goal:
        return solution
    raise QueryError(
        f"'cg' has not converged in {steps} steps: the residual is {float((before / (vector @ vector)).sqrt()):.2g} of"
        " the vector. Choose a larger damping"
    )


def lissa(
    hessian: Operator,
    vector: Tensor,
    damping: float,
    steps: int = 5000,
    repeats: int = 1,
    seed: int = 0,
    tolerance: float = TOLERANCE,
) -> Tensor:
    """By LiSSA (Agarwal et al. 2017; Koh and Liang 2017): x ← x + (v - (H + damping) x) / scale, H of a random batch.

    Batches are drawn in proportion to their sizes, so that H is right on average. The scale is an upper estimate of the
    largest eigenvalue over all batches. Stops after so many ``steps``, or when one batch holds all data and the
    residual is ``tolerance`` of the vector. Of several batches x never comes to rest: its mean over the second half of
    the steps is taken. ``repeats`` runs are averaged. QueryError where it diverges.
    """
    require_positive(damping)
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.tensor(hessian.sizes, dtype=torch.float64)
    scale = max(_largest(hessian, number, vector, generator) for number in range(len(sizes))) + damping
    runs = []
    for _ in range(repeats):
        solution, later = vector / scale, torch.zeros_like(vector)
        for step in range(steps):
            number = int(torch.multinomial(sizes, 1, generator=generator))
            residual = vector - hessian.times_batch(number, solution) - damping * solution
            solution = solution + residual / scale
            if len(sizes) == 1 and residual.norm() <= tolerance * vector.norm():
                break
            _require_bounded(solution, vector, damping)
            if step >= steps // 2:
                later += solution / (steps - steps // 2)
        runs.append(solution if len(sizes) == 1 else later)
    return torch.stack(runs).mean(0)


def _largest(hessian: Operator, number: int, like: Tensor, generator: torch.Generator) -> float:
    """The largest magnitude of an eigenvalue of a batch's Hessian, by power iteration, and a bit more."""
    direction = torch.randn(len(like), generator=generator, dtype=like.dtype)
    size = torch.zeros((), dtype=like.dtype)
    for _ in range(30):
        direction = hessian.times_batch(number, direction / direction.norm())
        size = direction.norm()
        if not size > 0:
            return 0.0
    return 1.1 * float(size)


def _require_bounded(solution: Tensor, vector: Tensor, damping: float) -> None:
    # |(H + damping)⁻¹ v| is at most |v| / damping if no eigenvalue of H is negative.
    if not solution.norm() <= 10 * vector.norm() / damping:
        raise QueryError(
            f"'lissa' diverges: the Hessian, or that of one of its batches, has eigenvalues below -{damping}, its"
            " damping. Choose a larger damping, or 'ekfac', which never is negative"
        )


def arnoldi(hessian: Operator, vector: Tensor, damping: float, largest: Eigenpairs | None = None) -> Tensor:
    """By the largest eigenvalues (Schioppa et al. 2022): Σ q ⟨q, v⟩ / (λ + damping) over eigenvectors q of H.

    ``largest`` are those of ``eigenpairs``, which serve for any vector. What of v lies outside of their span is
    dropped, and so are directions whose λ + damping is not positive.
    """
    require_positive(damping)
    values, vectors = largest or eigenpairs(hessian, len(vector), vector.dtype)
    weights = torch.where(values + damping > 0, 1 / (values + damping), torch.zeros_like(values))
    found: Tensor = vectors.T @ (weights * (vectors @ vector))
    return found


def eigenpairs(
    hessian: Operator, width: int, dtype: torch.dtype, steps: int = 200, rank: int = 100, seed: int = 0
) -> Eigenpairs:
    """H's ``rank`` largest eigenvalues [≤ rank] and their eigenvectors [≤ rank, width], near enough.

    They are those within the span of ``steps`` powers of H times a random vector.
    """
    start = torch.randn(width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    vectors = _krylov(hessian, start, min(steps, width))
    projected = vectors @ torch.stack([hessian.times(each) for each in vectors]).T
    values, turned = torch.linalg.eigh((projected + projected.T) / 2)
    return values[-rank:], turned[:, -rank:].T @ vectors


def _krylov(hessian: Operator, start: Tensor, steps: int) -> Tensor:
    """Orthonormal vectors [≤ steps, width] that span the powers of H times the start."""
    vectors = [start / start.norm()]
    while len(vectors) < steps:
        following = hessian.times(vectors[-1])
        size, found = following.norm(), torch.stack(vectors)
        # Once more: rounding leaves a part of the earlier ones behind.
        for _ in range(2):
            following = following - found.T @ (found @ following)
        if not following.norm() > 1e-6 * size:
            break
        vectors.append(following / following.norm())
    return torch.stack(vectors)
