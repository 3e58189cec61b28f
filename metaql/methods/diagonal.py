"""The diagonal of a Fisher matrix, E[g²] over samples, of layers whose gradients are no products of factors."""

from __future__ import annotations

import torch
from torch import Tensor

from metaql.methods.means import Mean


class Diagonal(Mean):
    """g² over samples, of a layer's laid-out gradients, [width]."""

    def add(self, gradients: Tensor) -> None:
        """The gradients of n samples, [n, width]."""
        self._plus(gradients.square().sum(0))
        self.samples += len(gradients)

    def add_rows(self, rows: Tensor, owners: Tensor, values: Tensor, shape: tuple[int, int], samples: int) -> None:
        """The gradients of a table [rows, columns] of that shape, without laying them out.

        Values [p, columns] are added to the gradient of the sample that is their owner, in the table's row ``rows``.
        """
        places, which = torch.unique(owners * shape[0] + rows, return_inverse=True)
        sums = values.new_zeros(len(places), shape[1]).index_add_(0, which, values)
        squares = sums.new_zeros(shape).index_add_(0, places % shape[0], sums.square_())
        self._plus(squares.flatten())
        self.samples += samples
