"""The inverse of a layer's curvature in its eigenbasis, where it is diagonal, for products of gradients in factors.

With â = Q_Aᵀ a and b̂ = Q_Sᵀ b, ⟨g, (F + damping)⁻¹ h⟩ = Σ_ij ĝ_ij W_ij ĥ_ij, where ĝ = Σ_s b̂_s â_sᵀ and
W = 1 / (Λ + damping). In many directions Λ is nothing beside the damping, as in those of inputs and units that are
always zero: W is 1/damping there, and products times a constant are had from the factors.

Letters: p positions, i a layer's input width with its bias, o its output width, i' and o' those that Λ is felt in.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metaql.methods.curvature import LayerCurvature, as_matrices
from metaql.methods.damping import inverse


@dataclass(frozen=True)
class Eigenbasis:
    """W is ``felt`` [o', i'], float64, in the first directions, and ``flat`` in all others.

    ``inputs`` [i, i] and ``outputs`` [o, o] have the directions in columns.
    """

    inputs: Tensor
    outputs: Tensor
    felt: Tensor
    flat: float
    bias: bool

    def suffixes(self, values: Tensor, weight: bool = True, bias: bool = True) -> Tensor:
        """[p, i] of the suffixes [p, input width]; of the weight's or the bias' gradient alone, if so asked."""
        inputs = self.inputs.to(values)
        if not (self.bias and bias):
            return values @ inputs[: values.shape[1]]
        return torch.addmm(inputs[-1], values, inputs[:-1]) if weight else inputs[-1:].expand(len(values), -1)

    def prefixes(self, values: Tensor) -> Tensor:
        """[p, o] of the prefixes [p, output width]."""
        return values @ self.outputs.to(values)

    def gradients(self, values: Tensor) -> Tensor:
        """[n, o, i] of laid-out gradients [n, width]."""
        shape = (1, len(self.outputs), len(self.inputs))
        turned: Tensor = (
            self.outputs.T.to(values) @ as_matrices(values, shape, self.bias)[:, 0] @ self.inputs.to(values)
        )
        return turned

    def times_felt(self, values: Tensor) -> Tensor:
        """[..., o', i'] times W, in their place if possible."""
        if self.felt.numel() == 0 or float(self.felt.max()) < torch.finfo(values.dtype).max:
            return values.mul_(self.felt.to(values))
        # The inverse of a small eigenvalue may be more than float32 holds, though its product is not.
        return (values * self.felt.to(values.device)).to(values.dtype)

    def times_flat(self, values: Tensor) -> Tensor:
        """Times W where it is the same."""
        return (values.double() * self.flat).to(values.dtype)


def eigenbasis(curvature: LayerCurvature, damping: float | None, tolerance: float) -> Eigenbasis | None:
    """W is taken for 1/damping where it differs by less than a share ``tolerance``.

    None for a layer with several groups, and in the parameters' own coordinates.
    """
    if curvature.basis is None or len(curvature.eigenvalues) != 1:
        return None
    basis, (values,) = curvature.basis, curvature.eigenvalues
    added = curvature.damping(damping)
    felt = values > tolerance * added
    rows, columns = felt.any(1), felt.any(0)
    order = (torch.argsort(each.logical_not(), stable=True) for each in (columns, rows))
    inputs, outputs = (one[0][:, place] for one, place in zip((basis.inputs, basis.outputs), order, strict=True))
    # Without any damping there is no eigenvalue, nor a gradient: whatever it is multiplied with.
    flat = 1 / added if added else 0.0
    inverses = inverse(values, added) if added else torch.zeros_like(values)
    return Eigenbasis(inputs, outputs, inverses[rows][:, columns], flat, curvature.bias)
