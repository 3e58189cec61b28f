"""A gradient times a symmetric matrix, a vector of the session; here the inverse of a curvature that was fitted."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from metaql.storage.blocks import Block, Full
from metaql.storage.schema import Layer
from metaql.udfs.definitions import Combination
from metaql.udfs.patterns import Space

if TYPE_CHECKING:
    from metaql.udfs.curvatures import Fitted
    from metaql.udfs.session import Session


@dataclass(frozen=True, eq=False)
class Multiplied:
    """A gradient times a symmetric matrix, laid out."""

    gradient: Combination

    @property
    def matrix(self) -> str:
        """What tells the matrix from all others."""
        raise NotImplementedError

    @cached_property
    def key(self) -> bytes:
        """A digest of the gradient and the matrix."""
        return hashlib.blake2b(f"{self.matrix}\n".encode() + self.gradient.key, digest_size=16).digest()

    @property
    def space(self) -> Space:
        """That of the gradient."""
        return self.gradient.space

    def positions(self, session: Session, layer: Layer) -> float | None:
        """None: it has no factors."""
        return None


@dataclass(frozen=True, eq=False)
class Preconditioned(Multiplied):
    """(F + damping)⁻¹ g, layer by layer; ``damping`` None is a tenth of each layer's mean eigenvalue."""

    fitted: Fitted
    damping: float | None

    @property
    def matrix(self) -> str:
        """The curvature and the damping."""
        fitted = self.fitted
        return f"{fitted.store.id} {fitted.saved.number} {fitted.method} {self.damping}"

    def compute(self, session: Session, layers: tuple[Layer, ...], as_factors: bool) -> dict[str, Block]:
        """Laid out, whatever is asked for."""
        return {layer.name: self._compute(session, layer) for layer in layers}

    def _compute(self, session: Session, layer: Layer) -> Block:
        session.work.go_on()
        block = self.gradient.compute(session, (layer,), as_factors=False)[layer.name]
        assert isinstance(block, Full)
        return Full(self.fitted.layers[layer.name].precondition(block.gradient, self.damping))
