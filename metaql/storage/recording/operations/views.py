"""Views of parameters: which parameter a tensor shows, and where its elements lie in it.

Autograd adds a view's gradient to its parameter's, so a use of a view is a use of the parameter. How the view
was made does not matter, nor when: torch knows its base, and its strides say the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


def root(tensor: Tensor) -> Tensor:
    """The parameter that this is a view of, else the tensor itself.

    A view that repeats elements, as ``expand`` makes it, is a tensor of its own.
    """
    if isinstance(tensor, nn.Parameter) or not tensor._is_view():
        return tensor
    base = tensor._base
    # One made under no_grad says that it requires a gradient, and passes none on.
    if not isinstance(base, nn.Parameter) or tensor.dtype != base.dtype or tensor.grad_fn is None:
        return tensor
    repeats = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor if repeats or tensor.is_neg() or tensor.is_conj() else base


def is_parameter(tensor: object) -> bool:
    """Whether this is a parameter or a view of one."""
    return isinstance(tensor, Tensor) and isinstance(root(tensor), nn.Parameter)


def is_plain(*tensors: Tensor) -> bool:
    """Whether these are dense tensors of real numbers."""
    return all(each.layout == torch.strided and not each.is_complex() for each in tensors)


@dataclass(frozen=True)
class Rectangle:
    """A matrix that consists of these rows and columns of another one, [height, width], or of their transpose."""

    rows: range
    columns: range
    height: int
    width: int
    transposed: bool

    def spread_rows(self, values: Tensor) -> Tensor:
        """[..., rows] => [..., height], zero in all others."""
        return _spread(values, self.rows, self.height)

    def spread_columns(self, values: Tensor) -> Tensor:
        """[..., columns] => [..., width], zero in all others."""
        return _spread(values, self.columns, self.width)


def _spread(values: Tensor, places: range, size: int) -> Tensor:
    if places == range(size):
        return values
    spread = values.new_zeros(*values.shape[:-1], size)
    spread[..., places.start : places.stop : places.step] = values
    return spread


def rectangle(view: Tensor) -> Rectangle | None:
    """Where a view [o, i] of a matrix lies in it; None if it is none or skips around in it.

    A parameter shows all of itself. A vector stands for a matrix of one column.
    """
    whole = root(view)
    if view is whole:
        height, width = view.shape if view.dim() == 2 else (len(view), 1)
        return Rectangle(range(height), range(width), height, width, False)
    if view.dim() != 2 or whole.dim() != 2 or not whole.is_contiguous() or not view.numel():
        return None
    height, width = whole.shape
    first_row, first_column = divmod(_offset(view, whole), width)
    for transposed in (False, True):
        sizes, strides = (view.shape, view.stride()) if not transposed else (view.shape[::-1], view.stride()[::-1])
        down = 1 if sizes[0] == 1 else strides[0] // width if strides[0] % width == 0 else 0
        right = 1 if sizes[1] == 1 else strides[1]
        if down < 1 or right < 1:
            continue
        rows = range(first_row, first_row + down * sizes[0], down)
        columns = range(first_column, first_column + right * sizes[1], right)
        if rows[-1] < height and columns[-1] < width:
            return Rectangle(
                range(rows[0], rows[-1] + 1, down), range(columns[0], columns[-1] + 1, right), height, width, transposed
            )
    return None


@dataclass(frozen=True)
class Places:
    """Where each element of a view lies in its parameter, both flattened."""

    shape: tuple[int, ...]
    own_stride: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def spread(self, values: Tensor) -> Tensor:
        """[..., elements of the view] => [..., elements of the parameter], zero in all others."""
        numbers = torch.empty_strided(self.shape, self.own_stride, dtype=torch.int64)
        numbers.copy_(torch.arange(numbers.numel()).reshape(self.shape))
        places = numbers.as_strided(self.size, self.stride, self.offset).flatten().to(values.device)
        return values.new_zeros(*values.shape[:-1], numbers.numel()).index_add_(-1, places, values)


def places(view: Tensor) -> Places | None:
    """Where a view lies; None for a parameter itself."""
    whole = root(view)
    if view is whole:
        return None
    return Places(tuple(whole.shape), whole.stride(), tuple(view.shape), view.stride(), _offset(view, whole))


def _offset(view: Tensor, whole: Tensor) -> int:
    return int(view.storage_offset()) - int(whole.storage_offset())
