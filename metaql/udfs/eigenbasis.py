"""Inner products of gradients in factors with preconditioned ones, in the eigenbasis of the curvature.

Laid out, a preconditioned gradient has to be turned into the eigenbasis and back, Q_S W∘(Q_Sᵀ G Q_A) Q_Aᵀ. Turning both
sides' factors instead costs little beside many products, and where W is a constant the factors are all that is needed:

    ⟨g, P h⟩ = Σ_{felt} ĝ_ij W_ij ĥ_ij + flat · (Σ_s Σ_t (b̂_s·b̂'_t)(â_s·â'_t over flat inputs)
                                               + (b̂_s·b̂'_t over flat outputs)(â_s·â'_t over felt inputs))
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metaql.methods.curvature import LayerCurvature
from metaql.methods.eigenbasis import Eigenbasis, eigenbasis
from metaql.storage.blocks import Block, Factored, Full, lay_out
from metaql.storage.schema import Layer, Parameter
from metaql.udfs import costs
from metaql.udfs.costs import EIGENBASIS, Constants, Side
from metaql.udfs.kernels import matrix, some
from metaql.udfs.patterns import Term
from metaql.udfs.preconditioned import Preconditioned
from metaql.udfs.references import Ints
from metaql.udfs.rows import Rows
from metaql.udfs.slices import summed
from metaql.udfs.vectors import VectorSource, join

if TYPE_CHECKING:
    from metaql.udfs.session import Session


@dataclass(frozen=True)
class Piece:
    """Directions of a layer's factors; the gradients in them are those of a layer of their own."""

    layer: Layer
    inputs: slice
    outputs: slice
    felt: bool

    @property
    def term(self) -> Term:
        """Both sides' gradients in these directions."""
        return Term(self.layer, self.layer, ((0, 0),))

    def factors(self, block: Factored) -> Factored:
        """These directions of a block that was turned."""
        return replace(block, suffix=block.suffix[:, self.inputs], prefix=block.prefix[:, self.outputs])


@dataclass(frozen=True)
class InEigenbasis:
    """How rows are multiplied with vectors that the same curvature preconditions, in one layer."""

    term: Term
    basis: Eigenbasis
    vectors: Rows
    pieces: tuple[Piece, ...]

    @property
    def numbers(self) -> int:
        """Those of a vector that are kept while all rows are multiplied with it."""
        return sum(piece.layer.width for piece in self.pieces if piece.felt)

    def turned(self, block: Block) -> list[Block]:
        """Rows in the eigenbasis, piece by piece."""
        assert isinstance(block, Factored)
        whole = self._turned(block, self.term.weight, self.term.bias)
        return [piece.factors(whole) for piece in self.pieces]

    def preconditioned(self, session: Session, part: slice) -> list[Block]:
        """Some of the vectors in the eigenbasis, piece by piece: laid out where the curvature is felt."""
        numbers = self.vectors.numbers[part]
        key = numbers.tobytes(), self.term.right.name, self.basis.felt.shape
        return session.vectors.together(key, lambda: self._preconditioned(session, numbers))

    def _preconditioned(self, session: Session, numbers: Ints) -> list[Block]:
        layer, found = self.term.right, []
        for vector in session.vectors.definitions(numbers):
            assert isinstance(vector, Preconditioned)
            session.work.go_on()
            found.append(vector.gradient.compute(session, (layer,), as_factors=True)[layer.name])
        return self.preconditioned_block(join(layer, found))

    def preconditioned_block(self, block: Block) -> list[Block]:
        """Gradients times the inverse of the curvature, piece by piece."""
        return self._of_factors(block) if isinstance(block, Factored) else self._of_laid_out(block)

    def products(self, session: Session, left: list[Block], right: list[Block], part: slice) -> Tensor:
        """Every left row with some of the vectors."""
        found = zip(self.pieces, left, right, strict=True)
        return summed([matrix(piece.term, own, some(other, part), session.costs) for piece, own, other in found])

    def _of_factors(self, block: Factored) -> list[Block]:
        whole = self._turned(block)
        flat = replace(whole, prefix=self.basis.times_flat(whole.prefix))
        return [
            self._felt(lay_out(piece.layer, piece.factors(whole))) if piece.felt else piece.factors(flat)
            for piece in self.pieces
        ]

    def _of_laid_out(self, block: Block) -> list[Block]:
        whole = self.basis.gradients(lay_out(self.term.right, block))
        found = [(piece, whole[:, piece.outputs, piece.inputs].flatten(1)) for piece in self.pieces]
        return [self._felt(one) if piece.felt else Full(self.basis.times_flat(one)) for piece, one in found]

    def _felt(self, gradients: Tensor) -> Full:
        return Full(self.basis.times_felt(gradients.unflatten(1, self.basis.felt.shape)).flatten(1))

    def _turned(self, block: Factored, weight: bool = True, bias: bool = True) -> Factored:
        suffix = self.basis.suffixes(block.suffix, weight, bias)
        return replace(block, suffix=suffix, prefix=self.basis.prefixes(block.prefix))


def in_eigenbasis(session: Session, term: Term, left: Rows, right: Rows) -> InEigenbasis | None:
    """How to multiply in the eigenbasis; None where that is not possible, or costs more than without it."""
    vectors = _alike(right)
    if not (vectors and len(left) and term.by_factors) or isinstance(left.source, VectorSource):
        return None
    own = left.source.positions(term.left, left.numbers)
    found = split(term, vectors[0].fitted.layers[term.right.name], vectors[0].damping, right)
    if found is None or own is None:
        return None
    counts = [vector.gradient.positions(session, term.right) for vector in vectors]
    known = [count for count in counts if count is not None]
    each = sum(known) / len(known) if len(known) == len(counts) else None
    seconds = _seconds(session.costs, found, Side(len(left), own / len(left)), Side(len(vectors), each))
    return found if session.costs.choose(seconds) == EIGENBASIS else None


def _alike(rows: Rows) -> tuple[Preconditioned, ...]:
    """The vectors, if one curvature with one damping preconditions all of them."""
    if not isinstance(rows.source, VectorSource):
        return ()
    found = rows.source.vectors.definitions(rows.numbers)
    vectors = tuple(one for one in found if isinstance(one, Preconditioned))
    alike = {(id(one.fitted), one.damping) for one in vectors}
    return vectors if len(vectors) == len(found) and len(alike) == 1 else ()


def split(term: Term, curvature: LayerCurvature, damping: float | None, vectors: Rows) -> InEigenbasis | None:
    """The layer's directions in pieces; None where its curvature is no product of two matrices."""
    dtype = torch.float64 if "float64" in (term.left.dtype, term.right.dtype) else torch.float32
    basis = eigenbasis(curvature, damping, torch.finfo(dtype).eps)
    if basis is None:
        return None
    outputs, inputs = basis.felt.shape
    pieces = (
        _piece(term.right, slice(0, inputs), slice(0, outputs), felt=True),
        _piece(term.right, slice(inputs, len(basis.inputs)), slice(0, len(basis.outputs)), felt=False),
        _piece(term.right, slice(0, inputs), slice(outputs, len(basis.outputs)), felt=False),
    )
    return InEigenbasis(term, basis, vectors, tuple(piece for piece in pieces if piece.layer.width))


def _piece(layer: Layer, inputs: slice, outputs: slice, felt: bool) -> Piece:
    o, i = outputs.stop - outputs.start, inputs.stop - inputs.start
    weight = Parameter(layer.parameters[0].name, (o, i))
    part = replace(layer, kind="linear", parameters=(weight,), input_width=i, output_width=o, unfold=None)
    return Piece(part, inputs, outputs, felt)


def _seconds(machine: Constants, found: InEigenbasis, left: Side, right: Side) -> dict[str, float]:
    """Seconds with and without turning both sides; ``right`` is of the gradients before they are preconditioned."""
    layer = found.term.left
    turned = costs.turned(machine, layer, left) + costs.turned(machine, layer, right)
    for piece in found.pieces:
        other = Side(right.samples, None) if piece.felt else right
        turned += min(costs.matrix(machine, piece.layer, left, other).values())
        if piece.felt and right.positions is not None:
            turned += right.samples * costs.lay_out(machine, piece.layer, right.positions)
    there_and_back = 2 * costs.turned(machine, layer, Side(right.samples, None))
    ways = costs.matrix(machine, layer, left, Side(right.samples, None))
    return {EIGENBASIS: turned, **{way: there_and_back + seconds for way, seconds in ways.items()}}
