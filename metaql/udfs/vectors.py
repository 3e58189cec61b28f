"""Vectors that live in this process only: averages, sums, and gradients that a model computed just now.

A vector is known by its definition, which is small (the references it combines, or an input and a target) and
kept as long as the connection. What it holds is computed one layer at a time when first asked for, kept in a
cache bounded in bytes, and computed again when the cache has dropped it; so a query that looks at a result
twice may do so at any time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from metaql.errors import ReferenceError
from metaql.storage.blocks import Block, Factored, Full, lay_out, offsets_of, size, split, whole
from metaql.storage.cache import Cache
from metaql.storage.schema import Layer
from metaql.udfs import costs
from metaql.udfs.costs import Constants, Side
from metaql.udfs.kernels import restored
from metaql.udfs.patterns import Space
from metaql.udfs.references import Ints, constant
from metaql.udfs.slices import positions

if TYPE_CHECKING:
    from metaql.udfs.session import Session
    from metaql.udfs.sources import Source

CACHE_BYTES = 512 << 20
# Those that are kept for the rows that follow, all together in a form of their own.
TOGETHER_BYTES = 256 << 20
# As many samples as make what is done once for all of them cost nothing.
MANY = 1e6
# The part of laying out that factors must have cost before a guess at the rows to come is believed.
PATIENCE = 0.1


class Definition(Protocol):
    """How a vector is made. Equal definitions have equal keys, and are one vector."""

    @property
    def key(self) -> bytes:
        """A digest of everything below."""

    @property
    def space(self) -> Space:
        """What it is a vector over."""

    def positions(self, session: Session, layer: Layer) -> float | None:
        """About how many positions the vector's factors have; None where there are none, or nobody knows yet."""

    def compute(self, session: Session, layers: tuple[Layer, ...], as_factors: bool) -> dict[str, Block]:
        """The vector in at least these layers, each as an unfolded block of one sample, if possible as asked for."""


class Vectors:
    """The definitions by number, and a cache of what they stand for."""

    def __init__(self, session: Session, cache_bytes: int = CACHE_BYTES) -> None:
        # The session owns this object; a plain reference back would keep both alive until a collection.
        self._session = weakref.proxy(session)
        self._cache: Cache[tuple[int, str], Block] = Cache(cache_bytes)
        self._together: Cache[tuple[object, ...], list[Block]] = Cache(TOGETHER_BYTES)
        self._lock = threading.Lock()
        self._definitions: list[Definition] = []
        self._numbers: dict[bytes, int] = {}
        # Seconds that a vector's factors have cost more than its laid-out form would have.
        self._spent: dict[tuple[int, str], float] = {}

    def add(self, definition: Definition) -> int:
        """The number of this vector; of an equal one that is already there the same."""
        with self._lock:
            number = self._numbers.setdefault(definition.key, len(self._definitions))
            if number == len(self._definitions):
                self._definitions.append(definition)
            return number

    def resolve(self, numbers: Ints) -> Iterator[tuple[Source, Any]]:
        """(source, places) of these vectors, by the space that they are in; usually one."""
        distinct = [int(numbers[0])] if len(numbers) and constant(numbers) else np.unique(numbers).tolist()
        if distinct and not 0 <= distinct[0] <= distinct[-1] < len(self._definitions):
            raise ReferenceError("a gradient reference names an average or sum that this connection never made")
        spaces = {number: self._definitions[number].space for number in distinct}
        if len({id(space) for space in spaces.values()}) == 1:
            yield VectorSource(self, spaces[distinct[0]]), slice(None)
            return
        for space in {id(space): space for space in spaces.values()}.values():
            members = [number for number in distinct if spaces[number] is space]
            yield VectorSource(self, space), np.flatnonzero(np.isin(numbers, members))

    def definitions(self, numbers: Ints) -> list[Definition]:
        """How these vectors are made."""
        return [self._definitions[number] for number in numbers.tolist()]

    def positions(self, number: int, layer: Layer) -> float | None:
        """About how many positions a vector's factors have; None where it is, or has to be, laid out."""
        found = self._cache.get((number, layer.name))
        if found is None:
            return self._definitions[number].positions(self._session, layer)
        return None if isinstance(found, Full) else positions(found)

    def together(self, key: tuple[object, ...], make: Callable[[], list[Block]]) -> list[Block]:
        """What is made of several vectors, which the key has the numbers of; made again when it was dropped."""
        found = self._together.get(key)
        if found is None:
            found = make()
            self._together.put(key, found, sum(map(size, found)))
        return found

    def block(self, number: int, layer: Layer) -> Block:
        """One vector in one layer, in the form that many samples are multiplied with best."""
        found = self._cache.get((number, layer.name))
        if found is not None:
            return found
        positions, many = self.positions(number, layer), costs.stored(layer, MANY)
        as_factors = positions is not None and costs.saved(self._costs, layer, many, positions) <= 0
        return self._computed(number, layer, as_factors)

    def against(self, number: int, layer: Layer, left: Side, rows: float) -> Block:
        """One vector in one layer, in the form that is best multiplied with ``left`` now and about ``rows`` in all.

        Laying a sum out pays when many rows follow. How many is a guess, so it waits until factors have cost a part
        of what laying out will, and does not wait longer than until they have cost as much.
        """
        found = self._cache.get((number, layer.name))
        positions = self.positions(number, layer)
        if positions is None:
            return found or self._computed(number, layer, as_factors=False)
        saved = costs.saved(self._costs, layer, left, positions)
        spent = self._spent.get((number, layer.name), 0.0) + max(saved, 0.0)
        price = costs.lay_out(self._costs, layer, positions)
        pays = saved * rows / max(left.samples, 1) > price and spent > PATIENCE * price
        if not pays and spent <= price:
            self._spent[number, layer.name] = spent
            return found or self._computed(number, layer, as_factors=True)
        if found is None:
            return self._computed(number, layer, as_factors=False)
        laid_out = Full(restored(layer, found))
        self._cache.put((number, layer.name), laid_out, size(laid_out))
        return laid_out

    def _computed(self, number: int, layer: Layer, as_factors: bool) -> Block:
        computed = self._definitions[number].compute(self._session, (layer,), as_factors)
        for name, block in computed.items():
            self._cache.put((number, name), block, size(block))
        return computed[layer.name]

    @property
    def _costs(self) -> Constants:
        found: Constants = self._session.costs
        return found


@dataclass(frozen=True)
class VectorSource:
    """The vectors over one space, as blocks."""

    vectors: Vectors
    space: Space

    def read(self, layer: Layer, row_numbers: Ints) -> Block:
        return join(layer, [self.vectors.block(number, layer) for number in row_numbers.tolist()])

    def stored(self, layer: Layer, row_numbers: Ints) -> tuple[Layer, Block]:
        return layer, self.read(layer, row_numbers)

    def row_bytes(self, layer: Layer) -> int:
        return 4 * layer.width

    def positions(self, layer: Layer, row_numbers: Ints) -> float | None:
        # The layer says how samples are kept. A sum may be laid out whatever it says, and has the positions of many.
        total = 0.0
        for number in row_numbers.tolist():
            count = self.vectors.positions(number, layer)
            if count is None:
                return None
            total += count
        return total

    def against(self, layer: Layer, row: int, left: Side, rows: float) -> Block:
        return self.vectors.against(row, layer, left, rows)

    def together(self, layer: Layer, row: int) -> int:
        return 1

    def stretch(self, row: int) -> tuple[int, int]:
        return row, row + 1


def join(layer: Layer, blocks: list[Block]) -> Block:
    """Blocks one after another; laid out when only some of them are."""
    if len(blocks) == 1:
        return blocks[0]
    factors = [block for block in blocks if not isinstance(block, Full)]
    if not blocks or len(factors) < len(blocks):
        rows = [lay_out(layer, block) for block in blocks]
        return Full(torch.cat(rows) if rows else torch.zeros(0, layer.width))
    columns = zip(*(split(layer, block) for block in factors), strict=True)
    return whole([_join([factored for _, factored in column]) for column in columns])


def _join(factored: list[Factored]) -> Factored:
    lengths = torch.cat([lengths_of(block) for block in factored])
    suffix, prefix = torch.cat([block.suffix for block in factored]), torch.cat([block.prefix for block in factored])
    return Factored(suffix, prefix, len(lengths), offsets_of(lengths))


def lengths_of(block: Factored) -> torch.Tensor:
    """The number of positions of each sample."""
    if block.offsets is not None:
        return block.offsets.diff()
    each = block.prefix.shape[0] // max(block.samples, 1)
    return torch.full((block.samples,), each, device=block.prefix.device)
