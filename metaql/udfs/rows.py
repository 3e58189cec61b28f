"""Rows of one source, read layer by layer in blocks of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from metaql.storage.blocks import Block
from metaql.storage.schema import Layer
from metaql.udfs.references import Floats, Ints
from metaql.udfs.slices import steps
from metaql.udfs.sources import Source

# Gathered copies of a block of rows stay below this, on each side.
BLOCK_BYTES = 64 << 20


@dataclass(frozen=True)
class Rows:
    """Rows of one source."""

    source: Source
    numbers: Ints
    # Whether the numbers follow one another, so that rows of one record batch are read without a copy.
    consecutive: bool = False

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, layer: Layer, part: slice = slice(None)) -> Block:
        """Their block."""
        return self.source.read(layer, self.numbers[part])

    def stored(self, layer: Layer, part: slice) -> tuple[Layer, Block]:
        """Their block as it is kept, and the layer that says how."""
        return self.source.stored(layer, self.numbers[part])

    def blocks(self, layer: Layer) -> Iterator[slice]:
        """Slices of the rows whose blocks have a bounded size, and need no copy where that can be had."""
        begin = 0
        while begin < len(self):
            end = len(self)
            if self.consecutive:
                end = min(end, begin + max(self.source.together(layer, int(self.numbers[begin])), 1))
            for part in steps(end - begin, self.source.row_bytes(layer) / 4, BLOCK_BYTES):
                yield slice(begin + part.start, begin + part.stop)
            begin = end


def floats(scores: torch.Tensor) -> Floats:
    """Scores as SQL gets them."""
    return scores.cpu().numpy().astype(np.float64)
