"""A layer's Fisher matrix as a Kronecker product: K-FAC, and EK-FAC, which corrects its eigenvalues.

K-FAC (Martens and Grosse 2015) takes F for A ⊗ S, whose eigenvectors are products of those of A and S. EK-FAC (George
et al. 2018) keeps these and takes F's own diagonal in them, Λ = E[(Q_Sᵀ g Q_A)²] over samples g, for the eigenvalues.

Letters: n samples, s positions, g groups, i one group's input width with its bias, o one group's output width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaql.errors import NotFiniteError
from metaql.methods.means import Mean
from metaql.methods.moments import Moments, by_group

# Gradients of samples with several positions are laid out this many bytes at a time.
_BYTES = 64 << 20


@dataclass(frozen=True)
class Basis:
    """The eigenvectors, in columns, and eigenvalues of A (``inputs``) and S (``outputs``), group by group.

    Values are float64, so that squares of small gradients do not underflow, and not negative: what rounding leaves
    below zero, of a matrix that has none, is zero.
    """

    inputs: Tensor
    outputs: Tensor
    input_values: Tensor
    output_values: Tensor

    @property
    def eigenvalues(self) -> Tensor:
        """Those of A ⊗ S, K-FAC's, [g, o, i]."""
        return self.output_values.unsqueeze(2) * self.input_values.unsqueeze(1)

    def to_basis(self, matrices: Tensor) -> Tensor:
        """Q_Sᵀ G Q_A of [..., g, o, i]."""
        return self.outputs.transpose(-1, -2) @ matrices @ self.inputs

    def from_basis(self, matrices: Tensor) -> Tensor:
        """Q_S G Q_Aᵀ of [..., g, o, i]."""
        return self.outputs @ matrices @ self.inputs.transpose(-1, -2)


def basis(moments: Moments, layer: str, dtype: torch.dtype = torch.float32) -> Basis | None:
    """The eigenbasis, computed in float64, its vectors in ``dtype``; None where no position was seen.

    NotFiniteError, which names the ``layer``, for moments that are NaN or infinite.
    """
    if moments.inputs is None or moments.outputs is None:
        return None
    inputs, input_values = _eigenbasis(moments.inputs, layer, "inputs")
    outputs, output_values = _eigenbasis(moments.outputs, layer, "output gradients")
    return Basis(inputs.to(dtype), outputs.to(dtype), input_values, output_values)


def _eigenbasis(matrices: Tensor, layer: str, what: str) -> tuple[Tensor, Tensor]:
    if not bool(torch.isfinite(matrices).all()):
        raise NotFiniteError(
            f"The second moments of the {what} of layer '{layer}' are NaN or infinite, so it has no curvature. Look "
            "for an overflow in the model, or leave the layer out with layers=."
        )
    # Near 1, so that squares of small gradients do not underflow within the decomposition.
    scale = matrices.abs().amax().clamp(min=torch.finfo(matrices.dtype).tiny)
    values, vectors = torch.linalg.eigh((matrices + matrices.transpose(1, 2)) / (2 * scale))
    return vectors, values.clamp(min=0) * scale


class Squares(Mean):
    """(Q_Sᵀ g Q_A)² over samples, EK-FAC's Λ [g, o, i]; without a basis g², the Fisher matrix' own diagonal."""

    def __init__(self, groups: int, bias: bool, found: Basis | None) -> None:
        super().__init__()
        self._groups, self._bias, self._basis = groups, bias, found

    def add(self, suffix: Tensor, prefix: Tensor) -> None:
        """The positions of n samples: [n, s, g·i] without the 1 for a bias, and [n, s, g·o]."""
        n, s = suffix.shape[:2]
        a, b = self._turned(suffix, prefix)
        if s == 1:
            # (b aᵀ)² is b² (a²)ᵀ, whose sum over samples is one product of matrices.
            self._plus(b.square().transpose(1, 2) @ a.square())
        elif s > 1:
            self._plus_laid_out(a.unflatten(1, (n, s)), b.unflatten(1, (n, s)))
        self.samples += n

    def _plus_laid_out(self, a: Tensor, b: Tensor) -> None:
        """[g, n, s, i] and [g, n, s, o], a few samples at a time."""
        step = max(1, _BYTES // (a.element_size() * self._groups * a.shape[3] * b.shape[3]))
        for some, others in zip(a.split(step, 1), b.split(step, 1), strict=True):
            self._plus((others.transpose(2, 3) @ some).square_().sum(1))

    def _turned(self, suffix: Tensor, prefix: Tensor) -> tuple[Tensor, Tensor]:
        """Suffixes and prefixes in the basis, [g, n·s, i] and [g, n·s, o]."""
        a, b = (by_group(values.flatten(0, 1), self._groups) for values in (suffix, prefix))
        if self._basis is None:
            return torch.cat([a, a.new_ones(*a.shape[:2], 1)], 2) if self._bias else a, b
        inputs, outputs = self._basis.inputs.to(a), self._basis.outputs.to(b)
        # The 1 of the bias picks the last row.
        turned = torch.baddbmm(inputs[:, -1:], a, inputs[:, :-1]) if self._bias else a @ inputs
        return turned, b @ outputs
