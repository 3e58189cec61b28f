"""The operations whose gradients have factors, one file each; ``OPERATIONS`` is the list of them.

A new one is a file with its ``Operation`` and a binder that has the torch function's own signature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metaql.storage.recording.operations import convolution, embedding, linear, normalisation
from metaql.storage.recording.operations.operation import Operation, Use

__all__ = ["OPERATIONS", "Operation", "Use"]

Binder = Callable[..., Use | None]

OPERATIONS: Mapping[Any, Binder] = {
    **linear.FUNCTIONS,
    **convolution.FUNCTIONS,
    **embedding.FUNCTIONS,
    **normalisation.FUNCTIONS,
}
