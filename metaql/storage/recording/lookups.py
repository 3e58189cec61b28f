"""Rows that an embedding looked up for no sample in particular, such as those of positions 0 to 99.

They meet the samples where they are added to something that has them: x[b, s] + W[i[s]] is x[b, s] + W[i[b, s]], with
the same indices for every sample. So it is at the sum that the table is taken to be used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from metaql.storage.recording.operations import Use
from metaql.storage.recording.operations.embedding import EMBEDDING

SUMS = (torch.add, torch.Tensor.add, torch.Tensor.add_)


@dataclass(eq=False)
class _Rows:
    """The rows that a use of a table gave, and whether they were noted as used where they are."""

    use: Use
    rows: Tensor
    noted: bool = False


@dataclass(eq=False)
class Lookups:
    """Rows that wait for what becomes of them.

    Should the same rows go both ways, the uses count them twice and do not add up to the table's gradient.
    """

    _waiting: dict[int, _Rows] = field(default_factory=dict)

    def keep(self, use: Use, output: Tensor) -> bool:
        """Whether these rows were taken in, as some that may have no samples."""
        if use.operation is not EMBEDDING or use.inputs.dim() == 0 or (use.inputs.dim() > 1 and len(use.inputs) > 1):
            return False
        self._waiting[id(output)] = _Rows(use, output)
        return True

    def any(self, tensors: Sequence[Tensor]) -> bool:
        """Whether some of these are such rows."""
        return bool(self._waiting) and any(id(each) in self._waiting for each in tensors)

    def before_change(self, tensor: Tensor) -> Iterator[tuple[Use, Tensor]]:
        """The use, and its output, of rows that are about to be changed in place."""
        found = self._waiting.get(id(tensor))
        if found is not None and not found.noted:
            found.noted = True
            yield found.use, found.rows

    def met(
        self, func: Callable[..., Any], tensors: Sequence[Tensor], kwargs: Mapping[str, Any], output: Any
    ) -> Iterator[tuple[Use, Tensor]]:
        """The uses, and their outputs, of rows that a function was called with."""
        for tensor in tensors:
            found = self._waiting.get(id(tensor))
            if found is None or output is tensor:
                continue
            if func in SUMS and not kwargs and len(tensors) == 2 and _is_broadcast(tensor, output):
                shape = output.shape[:-1]
                yield replace(found.use, inputs=found.use.inputs.expand(shape), axes=tuple(range(len(shape)))), output
            elif _is_reshaped(tensor, output):
                shape = output.shape[:-1]
                use = replace(found.use, inputs=found.use.inputs.reshape(shape), axes=tuple(range(len(shape))))
                self._waiting[id(output)] = _Rows(use, output)
            else:
                yield from self.before_change(tensor)


def _is_broadcast(rows: Tensor, output: Any) -> bool:
    return isinstance(output, Tensor) and output.shape != rows.shape and output.shape[-1] == rows.shape[-1]


def _is_reshaped(rows: Tensor, output: Any) -> bool:
    """Whether this is a view of the same rows in the same order, as ``unsqueeze`` makes it."""
    return (
        isinstance(output, Tensor)
        and output._base is rows
        and output.numel() == rows.numel()
        and output.dim() > 1
        and output.shape[-1] == rows.shape[-1]
        and output.is_contiguous()
        and rows.is_contiguous()
    )
