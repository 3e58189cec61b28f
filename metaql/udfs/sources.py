"""Where the blocks behind references come from."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from metaql.storage.blocks import Block, Factored, rows
from metaql.storage.schema import FACTORED, Layer, stored_parts
from metaql.storage.store import Store
from metaql.udfs import costs
from metaql.udfs.costs import Side
from metaql.udfs.device import DeviceBlocks
from metaql.udfs.patterns import Space
from metaql.udfs.references import Ints


class Source(Protocol):
    """Where the blocks of some references come from. Its layers carry no ``unfold``: blocks are unfolded."""

    @property
    def space(self) -> Space:
        """What its rows are vectors over."""

    def read(self, layer: Layer, rows: Ints) -> Block:
        """The unfolded block of these rows, in this order, on the source's device."""

    def stored(self, layer: Layer, rows: Ints) -> tuple[Layer, Block]:
        """The same as it is kept, which may have to be unfolded, and the layer that says so."""

    def row_bytes(self, layer: Layer) -> int:
        """Bytes of an average row of such a block."""

    def positions(self, layer: Layer, rows: Ints) -> float | None:
        """About how many positions these rows have together; None where they have no factors."""

    def against(self, layer: Layer, row: int, left: Side, rows: float) -> Block:
        """One row's block, in the form that is best multiplied with ``left`` now and with about ``rows`` in all."""

    def together(self, layer: Layer, row: int) -> int:
        """How many rows from this one on are there and can be read without gathering them."""

    def stretch(self, row: int) -> tuple[int, int]:
        """The rows around this one that are there without a gap: first, and one past the last."""


class StoreSource:
    """A store's rows, unfolded and on the device that scores are computed on."""

    def __init__(self, store: Store, name: str, device: DeviceBlocks | None = None) -> None:
        self.store, self.name, self._blocks = store, name, device
        self.device = None if device is None else device.device
        self.space = Space(tuple(_as_read(store, layer) for layer in store.layers))
        self._row_bytes: dict[str, int] = {}
        self._stored = {layer.name: layer for layer in store.layers}

    def read(self, layer: Layer, row_numbers: Ints) -> Block:
        stored, block = self.stored(layer, row_numbers)
        return rows(stored, block) if isinstance(block, Factored) else block

    def stored(self, layer: Layer, row_numbers: Ints) -> tuple[Layer, Block]:
        stored = self._stored[layer.name]
        return stored, (self._blocks or self.store).read(stored, row_numbers)

    def row_bytes(self, layer: Layer) -> int:
        if layer.name not in self._row_bytes:
            self._row_bytes[layer.name] = _row_bytes(self.store, self._stored[layer.name])
        return self._row_bytes[layer.name]

    def positions(self, layer: Layer, row_numbers: Ints) -> float | None:
        if layer.layout != FACTORED:
            return None
        if layer.positions is not None:
            return len(row_numbers) * layer.positions
        return len(row_numbers) * self.row_bytes(layer) / (4 * sum(costs.factor_widths(layer)))

    def against(self, layer: Layer, row: int, left: Side, rows: float) -> Block:
        return self.read(layer, np.array([row]))

    def together(self, layer: Layer, row: int) -> int:
        return self.store.together(self._stored[layer.name], row)

    def stretch(self, row: int) -> tuple[int, int]:
        return self.store.stretch(row)


def _as_read(store: Store, layer: Layer) -> Layer:
    """The layer of unfolded blocks, with as many positions as an average row has kept."""
    positions, *others = (_kept_positions(store, part) for part in stored_parts(layer))
    return replace(layer, unfold=None, positions=positions, looked_up=others[0] if others else layer.looked_up)


def _kept_positions(store: Store, layer: Layer) -> int | None:
    """Of an average row; what the layer says where nothing is stored."""
    segments = [one for each in store.manifest.collections for one in each.segments if one.layer == layer.name]
    rows = sum(one.rows for one in segments)
    if layer.layout != FACTORED or not rows:
        return layer.positions
    return max(round(sum(one.statistics.positions for one in segments) / rows), 1)


def _row_bytes(store: Store, stored: Layer) -> int:
    if stored.unfold is None or stored.positions is None:
        return max(store.row_bytes(stored), 1)
    assert stored.input_width is not None
    assert stored.output_width is not None
    return 4 * stored.positions * (stored.groups * stored.input_width + stored.output_width)
