"""The curvature of one layer, and its inverse times a gradient laid out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metaql.methods.damping import damping_of, inverse
from metaql.methods.kronecker import Basis

DIAGONAL, KFAC, EKFAC = "diagonal", "kfac", "ekfac"


@dataclass(frozen=True)
class LayerCurvature:
    """Eigenvalues of a layer's Fisher matrix, float64 [g, o, i], in a basis, or (None) in the parameters themselves.

    ``bias`` says that the last of the i inputs is the bias. A layer whose gradient is no product of factors has one
    group and one output.
    """

    eigenvalues: Tensor
    basis: Basis | None
    bias: bool

    def damping(self, given: float | None = None) -> float:
        """What is added to the eigenvalues."""
        return damping_of(self.eigenvalues, given)

    def precondition(self, gradients: Tensor, damping: float | None = None) -> Tensor:
        """(F + damping)⁻¹ g for each gradient [..., width]: the weight row-major, then the bias."""
        matrices = as_matrices(gradients, tuple(self.eigenvalues.shape), self.bias)
        if self.basis is None:
            return as_vectors(self._divided(matrices, damping), self.bias)
        basis = replace(self.basis, inputs=self.basis.inputs.to(gradients), outputs=self.basis.outputs.to(gradients))
        return as_vectors(basis.from_basis(self._divided(basis.to_basis(matrices), damping)), self.bias)

    def _divided(self, matrices: Tensor, damping: float | None) -> Tensor:
        # In float64: the inverse of a small eigenvalue may be more than float32 holds, though its product is not.
        return (matrices * inverse(self.eigenvalues.to(matrices.device), damping)).to(matrices.dtype)


def as_matrices(gradients: Tensor, shape: tuple[int, ...], bias: bool) -> Tensor:
    """[..., width] => [..., g, o, i], the bias as the last column."""
    groups, outputs, inputs = shape
    if not bias:
        found: Tensor = gradients.unflatten(-1, shape)
        return found
    size = groups * outputs * (inputs - 1)
    weight = gradients[..., :size].unflatten(-1, (groups, outputs, inputs - 1))
    return torch.cat([weight, gradients[..., size:].unflatten(-1, (groups, outputs, 1))], dim=-1)


def as_vectors(matrices: Tensor, bias: bool) -> Tensor:
    """[..., g, o, i] => [..., width]: what ``as_matrices`` was made of."""
    if not bias:
        return matrices.flatten(-3)
    return torch.cat([matrices[..., :-1].flatten(-3), matrices[..., -1].flatten(-2)], dim=-1)
