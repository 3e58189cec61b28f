"""Rows of numbers of any shape: what they look like, whether they can be used, and going through them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from metaql.errors import QueryError

Shape = tuple[int, ...]

# As many rows as a network sees at a time when nothing is learnt.
ROWS = 1024


def in_parts(apply: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """What ``apply`` makes of rows [n, …], so many at a time, without gradients."""
    with torch.no_grad():
        return torch.cat([apply(part) for part in rows.split(ROWS)])


def usual_network(shape: Shape) -> str:
    """The network that fits rows of this shape: [d], [channels, length], [h, w] or [channels, h, w].

    Two axes are an image where both have 8 places or more and neither is over twice as long as the other.
    """
    if len(shape) == 2:
        return "conv2d" if min(shape) >= 8 and max(shape) <= 2 * min(shape) else "conv1d"
    return "conv2d" if len(shape) == 3 else "mlp"


def require_rows(features: Tensor) -> None:
    """QueryError for fewer than 2 rows, rows of no numbers, NaN or infinity."""
    if features.ndim < 2 or features[:1].numel() == 0:
        raise QueryError(f"features must be rows of at least one number each, not of shape {list(features.shape)}")
    if len(features) < 2:
        raise QueryError(f"training needs 2 rows or more, and there is {len(features)}")
    require_finite(features, "features")


def checked(features: Tensor, shape: Shape) -> Tensor:
    """The rows as they are; QueryError if they have another shape than those that a model was trained on."""
    if tuple(features.shape[1:]) != shape:
        raise QueryError(
            f"the model was trained on rows of shape {list(shape)}, and these have {list(features.shape[1:])}"
        )
    return features


def require_finite(values: Tensor, name: str) -> None:
    """QueryError that counts the rows with NaN or infinity, and names the first."""
    bad = ~values.isfinite().flatten(1).all(1)
    if bad.any():
        raise QueryError(
            f"{int(bad.sum())} of {len(values)} rows of {name} contain NaN or infinity, the first is row "
            f"{int(bad.nonzero()[0])}: leave them out, or fill in what is missing"
        )
