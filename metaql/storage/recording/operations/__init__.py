"""The operations whose gradients have factors, one file each; ``OPERATIONS`` is the list of them.

A new one is a file with its ``Operation`` and a binder that has the torch function's own signature and returns the
uses in a call, or none where it has to be left to the general way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from metaql.storage.recording.operations import (
    convolution,
    elementwise,
    embedding,
    embedding_bag,
    linear,
    normalisation,
    transposed_convolution,
)
from metaql.storage.recording.operations.operation import Operation, Use

__all__ = ["OPERATIONS", "Operation", "Use"]

Binder = Callable[..., list[Use]]

OPERATIONS: Mapping[Any, Binder] = {
    **linear.FUNCTIONS,
    **convolution.FUNCTIONS,
    **transposed_convolution.FUNCTIONS,
    **embedding.FUNCTIONS,
    **embedding_bag.FUNCTIONS,
    **normalisation.FUNCTIONS,
    **elementwise.FUNCTIONS,
}
