"""Where the blocks behind references come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch

from metaql.storage.blocks import Block, Factored, rows
from metaql.storage.schema import FACTORED, Layer
from metaql.storage.store import Store
from metaql.udfs.patterns import Space
from metaql.udfs.references import Ints
from metaql.udfs.slices import move


class Source(Protocol):
    """Where the blocks of some references come from. Its layers carry no ``unfold``: blocks are unfolded."""

    space: Space

    def read(self, layer: Layer, rows: Ints) -> Block:
        """The unfolded block of these rows, in this order, on the source's device."""

    def row_bytes(self, layer: Layer) -> int:
        """Bytes of an average row of such a block."""

    def positions(self, layer: Layer, rows: Ints) -> Iterator[int | None]:
        """How many positions these rows have, some rows at a time; None for rows without factors, or unknown ones."""

    def together(self, layer: Layer, row: int) -> int:
        """How many rows from this one on are there and can be read without gathering them."""


class StoreSource:
    """A store's rows, unfolded and on the device that scores are computed on."""

    def __init__(self, store: Store, name: str, device: torch.device | None = None) -> None:
        self.store, self.name, self.device = store, name, device
        self.space = Space(tuple(replace(layer, unfold=None) for layer in store.layers))
        self._row_bytes: dict[str, int] = {}
        self._stored = {layer.name: layer for layer in store.layers}

    def read(self, layer: Layer, row_numbers: Ints) -> Block:
        stored = self._stored[layer.name]
        block = self.store.read(stored, row_numbers)
        if self.device is not None:
            block = move(block, self.device)
        return rows(stored, block) if isinstance(block, Factored) else block

    def row_bytes(self, layer: Layer) -> int:
        if layer.name not in self._row_bytes:
            self._row_bytes[layer.name] = _row_bytes(self.store, self._stored[layer.name])
        return self._row_bytes[layer.name]

    def positions(self, layer: Layer, row_numbers: Ints) -> Iterator[int | None]:
        known = layer.layout == FACTORED and layer.positions is not None
        yield len(row_numbers) * (layer.positions or 0) if known else None

    def together(self, layer: Layer, row: int) -> int:
        return self.store.together(self._stored[layer.name], row)


def _row_bytes(store: Store, stored: Layer) -> int:
    if stored.unfold is None or stored.positions is None:
        return max(store.row_bytes(stored), 1)
    assert stored.input_width is not None
    assert stored.output_width is not None
    return 4 * stored.positions * (stored.groups * stored.input_width + stored.output_width)
