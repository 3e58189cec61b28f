"""What a session's vectors are made of: weighted sums of references, and single samples run through the model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from metaql.storage import schema
from metaql.storage.blocks import Block, Factored, Full, merge_rows, split, whole
from metaql.storage.schema import Layer
from metaql.udfs.contract import weighted, weighted_sum
from metaql.udfs.costs import factor_widths
from metaql.udfs.patterns import Space, Term
from metaql.udfs.references import Floats, Ints, References
from metaql.udfs.rows import Rows
from metaql.udfs.slices import columns, numbers
from metaql.udfs.work import Gathering

if TYPE_CHECKING:
    from metaql.udfs.session import Session
    from metaql.udfs.sources import Source

# Factors of a sum are kept up to this size; what is larger is laid out, which needs one gradient's room.
FACTOR_BYTES = 64 << 20


@dataclass(frozen=True, eq=False)
class Part:
    """Weighted rows of one store under one layer pattern; the rows are sorted and distinct."""

    store: int
    pattern: str
    rows: Ints
    weights: Floats


@dataclass(frozen=True, eq=False)
class Combination:
    """Σ weight·reference, over the space of the first part."""

    parts: tuple[Part, ...]
    space: Space

    @cached_property
    def key(self) -> bytes:
        """A digest: equal sums have equal keys, in whatever order the references came."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self.parts:
            digest.update(f"{part.store} {len(part.rows)} {part.pattern}\n".encode())
            digest.update(part.rows.tobytes())
            digest.update(part.weights.tobytes())
        return digest.digest()

    def positions(self, session: Session, layer: Layer) -> float | None:
        """About how many positions its factors have; None where they are too large, or not the sum's factors."""
        if layer.input_width is None:
            return None
        count = 0.0
        for piece in self._pieces(session, layer):
            positions = piece.positions()
            if positions is None:
                return None
            count += positions
        return count if 0 < 4 * count * sum(factor_widths(layer)) <= FACTOR_BYTES else None

    def compute(self, session: Session, layers: tuple[Layer, ...], as_factors: bool) -> dict[str, Block]:
        """The sum in these layers: as its parts' factors if asked for and possible, else laid out."""
        return {layer.name: self._compute(session, layer, as_factors) for layer in layers}

    def _compute(self, session: Session, layer: Layer, as_factors: bool) -> Block:
        pieces = self._pieces(session, layer)
        sizes = [sum(piece.size for piece in self._pieces(session, each)) for each in self.space.layers]
        # Layers are asked for in their order, as a rule.
        with session.work.gathering(sum(sizes), sum(sizes[: self.space.layers.index(layer)])) as gathering:
            joined = _join_factors(pieces, gathering) if as_factors else None
            return joined or Full(_lay_out(pieces, layer, gathering).unsqueeze(0))

    def _pieces(self, session: Session, layer: Layer) -> list[_Piece]:
        return [piece for part in self.parts for piece in _pieces(session, part, layer, self.space)]


@dataclass(frozen=True, eq=False)
class Replayed:
    """The gradient of a sample that is in no store, from the model."""

    model: str
    input: bytes
    target: int
    space: Space

    @cached_property
    def key(self) -> bytes:
        """A digest of the input and the target."""
        digest = hashlib.blake2b(f"{self.model} {self.target}\n".encode(), digest_size=16)
        digest.update(self.input)
        return digest.digest()

    def positions(self, session: Session, layer: Layer) -> float | None:
        """None: the model decides."""
        return None

    def compute(self, session: Session, layers: tuple[Layer, ...], as_factors: bool) -> dict[str, Block]:
        """Every layer, since one backward pass yields them all."""
        return session.model(self.model).gradient(self.input, self.target)


@dataclass(frozen=True, eq=False)
class _Piece:
    """What one source gives to a layer of the sum."""

    source: Source
    term: Term
    rows: Ints
    weights: Floats

    @property
    def whole(self) -> bool:
        """Whether it has all parameters of the layer."""
        return len(self.term.places) == len(self.term.right.parameters)

    def positions(self) -> float | None:
        """The positions of all rows; None where their factors, side by side, are not the sum's factors."""
        if self.term.left is self.term.right and self.whole:
            return self.source.positions(self.term.left, self.rows)
        return None

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return len(self.rows) * self.source.row_bytes(self.term.left)

    def blocks(self, gathering: Gathering) -> Iterator[tuple[Block, Tensor]]:
        """The rows with their weights, some at a time."""
        layer, size = self.term.left, self.source.row_bytes(self.term.left)
        rows = Rows(self.source, self.rows, self._in_order(layer))
        for part in rows.blocks(layer):
            block = rows.read(layer, part)
            yield block, torch.from_numpy(self.weights[part]).to(numbers(block))
            gathering.add(size * block.samples)

    def _in_order(self, layer: Layer) -> bool:
        """Whether the rows follow one another where several of them can be read without a copy."""
        first, last = int(self.rows[0]), int(self.rows[-1])
        return last - first + 1 == len(self.rows) and self.source.together(layer, first) > 1


def combine(session: Session, references: References, weights: Floats) -> Combination:
    """Σ weight·reference. Equal references are merged, so that the result depends on no order."""
    parts = []
    for store, pattern, places in references.groups():
        rows, inverse = np.unique(references.row[places], return_inverse=True)
        sums = np.bincount(inverse.ravel(), weights[places], len(rows)).astype(np.float64)
        parts.append(Part(store, pattern, rows, sums))
    parts.sort(key=lambda part: (part.store, part.pattern))
    source, _ = next(session.resolve(parts[0].store, parts[0].rows))
    for part in parts:
        # Asked for now, so that what can't be added up is an error of the query that tries.
        for other, _ in session.resolve(part.store, part.rows):
            other.space.shared(part.pattern, source.space, "")
    return Combination(tuple(parts), source.space)


def _pieces(session: Session, part: Part, layer: Layer, space: Space) -> Iterator[_Piece]:
    for source, places in session.resolve(part.store, part.rows):
        for term in source.space.shared(part.pattern, space, ""):
            if term.right.name == layer.name:
                yield _Piece(source, term, part.rows[places], part.weights[places])


def _join_factors(pieces: list[_Piece], gathering: Gathering) -> Block | None:
    """All positions as those of one sample, the weights multiplied into the prefixes; None if some are laid out."""
    scaled: list[list[Factored]] = []
    for piece in pieces:
        for block, weights in piece.blocks(gathering):
            if isinstance(block, Full):
                return None
            parts = [part for _, part in split(piece.term.left, block)]
            scaled.append([Factored(part.suffix, weighted(part, weights), 1) for part in parts])
    kinds = [part.kind for part in schema.parts(pieces[0].term.left)]
    return whole([_one_sample(kind, column) for kind, column in zip(kinds, zip(*scaled, strict=True), strict=True)])


def _one_sample(kind: str, blocks: Sequence[Factored]) -> Factored:
    found = Factored(torch.cat([block.suffix for block in blocks]), torch.cat([block.prefix for block in blocks]), 1)
    return merge_rows(found) if kind == "embedding" else found


def _lay_out(pieces: list[_Piece], layer: Layer, gathering: Gathering) -> Tensor:
    total: Tensor | None = None
    for piece in pieces:
        for block, weights in piece.blocks(gathering):
            value = _sum(piece.term.left, block, weights)
            if not (piece.whole and piece.term.left.parameters == layer.parameters):
                value = _place(piece.term, value)
            total = value if total is None else total + value
    # A layer that no part selects is zero there, which is a vector like any other.
    return torch.zeros(layer.width) if total is None else total


def _sum(layer: Layer, block: Block, weights: Tensor) -> Tensor:
    if isinstance(block, Full):
        return weights @ block.gradient
    return weighted_sum(layer, block, weights)


def _place(term: Term, value: Tensor) -> Tensor:
    """A sum over the left layer, in the columns of the right one; zero where nothing is selected."""
    parts = [value.new_zeros(parameter.width) for parameter in term.right.parameters]
    for place, other in term.places:
        parts[other] = columns(term.left, (place,), value.unsqueeze(0))[0]
    return torch.cat(parts)
