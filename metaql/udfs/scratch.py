"""Each thread's own buffer for a kernel's intermediate result.

Allocating some megabytes anew for every chunk of rows makes the system hand out fresh pages each time, which can
cost as much as the product that fills them.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    """One buffer for each dtype."""

    def __init__(self) -> None:
        self.kept: dict[torch.dtype, Tensor] = {}


_buffers = _Buffers()


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in the thread's buffer: use it before the next product, and don't keep it."""
    if left.device.type != "cpu":
        return left @ right
    out = _buffer(left.dtype, left.shape[0] * right.shape[1]).view(left.shape[0], right.shape[1])
    return torch.mm(left, right, out=out)


def _buffer(dtype: torch.dtype, count: int) -> Tensor:
    kept = _buffers.kept
    if dtype not in kept or len(kept[dtype]) < count:
        kept[dtype] = torch.empty(count, dtype=dtype)
    return kept[dtype][:count]
