"""What was fitted for each layer, as the tensors of one file and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from metaql.methods.curvature import KFAC, LayerCurvature
from metaql.methods.kronecker import Basis
from metaql.storage.schema import Layer

_BASIS = ("inputs", "outputs", "input_values", "output_values")


def pack(fitted: Mapping[str, LayerCurvature], method: str) -> dict[str, Tensor]:
    """The tensors by ``layer/name``, on the CPU. K-FAC's eigenvalues are products of the basis' own."""
    found: dict[str, Tensor] = {}
    for layer, curvature in fitted.items():
        parts = {} if curvature.basis is None else vars(curvature.basis)
        if method != KFAC or curvature.basis is None:
            parts = {**parts, "eigenvalues": curvature.eigenvalues}
        found |= {f"{layer}/{name}": values.detach().cpu().contiguous() for name, values in parts.items()}
    return found


def unpack(layers: tuple[Layer, ...], tensors: Mapping[str, Tensor], method: str) -> dict[str, LayerCurvature]:
    """Each layer's curvature by ``method``; what was fitted by EK-FAC serves for K-FAC too."""
    return dict(_unpack(layers, tensors, method))


def _unpack(
    layers: tuple[Layer, ...], tensors: Mapping[str, Tensor], method: str
) -> Iterator[tuple[str, LayerCurvature]]:
    for layer in layers:
        if f"{layer.name}/inputs" not in tensors:
            yield layer.name, LayerCurvature(tensors[f"{layer.name}/eigenvalues"], None, bias=False)
            continue
        basis = Basis(*(tensors[f"{layer.name}/{name}"] for name in _BASIS))
        eigenvalues = basis.eigenvalues if method == KFAC else tensors[f"{layer.name}/eigenvalues"]
        yield layer.name, LayerCurvature(eigenvalues, basis, layer.has_bias)
