"""A gradient times the inverse of the training loss' Hessian, which the model is run for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from metaql.storage.blocks import Block, Full, lay_out
from metaql.storage.schema import Layer
from metaql.udfs.preconditioned import Multiplied

if TYPE_CHECKING:
    from metaql.udfs.session import Session


@dataclass(frozen=True, eq=False)
class Solved(Multiplied):
    """(H + damping)⁻¹ g over all layers at once, by one of the solvers."""

    model: str
    method: str
    damping: float

    @property
    def matrix(self) -> str:
        """The model, the method and the damping."""
        return f"{self.model} {self.method} {self.damping}"

    def compute(self, session: Session, layers: tuple[Layer, ...], as_factors: bool) -> dict[str, Block]:
        """Every layer, laid out: the Hessian ties them all together."""
        every = self.space.layers
        blocks = self.gradient.compute(session, every, as_factors=False)
        parts = [lay_out(layer, blocks[layer.name])[0] for layer in every]
        found = session.model(self.model).solve(self.method, torch.cat(parts), self.damping, session.work.go_on)
        pieces = found.to(parts[0]).split([layer.width for layer in every])
        return {layer.name: Full(piece.unsqueeze(0)) for layer, piece in zip(every, pieces, strict=True)}
