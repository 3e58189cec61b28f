"""Whether a forward pass may have put rows elsewhere than it will for the next batch of the same shapes.

An index that no data went into (positions, buckets of distances, a causal mask) moves rows alike in every such
batch. So a pass is followed from what is constant, the model's own tensors and what is made of them alone; all
else counts as data, random numbers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

# Functions that take rows from, or put them to, places that an index says.
INDEXING = frozenset(
    (
        *("__getitem__", "__setitem__", "index_select", "gather", "take", "take_along_dim", "embedding"),
        *("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_put", "repeat_interleave"),
    )
)
# Functions whose own values decide where rows go, or how many there are.
ORDERING = frozenset(
    (
        *("sort", "argsort", "msort", "topk", "nonzero", "argwhere", "unique", "unique_consecutive"),
        *("masked_select", "masked_scatter", "_pack_padded_sequence", "_pad_packed_sequence"),
    )
)
# Functions that hand pieces to Python, which may put them together in any order; with the place of their dim.
_CUTTING = {"split": 2, "split_with_sizes": 2, "chunk": 2, "tensor_split": 2, "unbind": 1}
# Functions that move rows as their arguments say.
_MOVING = frozenset(("__getitem__", "__setitem__", "select", "narrow", "flip", "roll"))
# Functions that tell Python about values, on which it may decide.
_TELLING = frozenset(
    (
        *("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "__contains__"),
        *("is_nonzero", "equal", "allclose"),
    )
)
_EXPORTING = frozenset(("numpy", "__array__", "__dlpack__"))
_OPERATORS_IN_PLACE = frozenset(
    (
        "__setitem__",
        *(f"__i{each}__" for each in ("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "or", "xor")),
    )
)
_CONSTANTS = frozenset(("arange", "zeros", "ones", "full", "eye", "linspace", "tril_indices", "triu_indices"))
_FROM_PYTHON = frozenset(("tensor", "as_tensor", "new_tensor", "asarray", "__array_wrap__"))
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial", "normal", "uniform", "exponential", "geometric", "poisson")


class RowMoves:
    """Follows the torch functions of one pass; ``constants`` are tensors that are the same for every batch."""

    def __init__(self, constants: Iterable[Tensor]) -> None:
        self.by_data = False
        self._path: list[tuple[str, str]] = []
        self._told: list[Any] = []
        # Held, so that no other tensor gets the same id.
        self._constants = {id(each): each for each in constants}

    @property
    def path(self) -> tuple[Any, ...]:
        """The moves that Python code asked for by numbers; where they differ, so may the places of rows."""
        return tuple(self._path)

    @property
    def told(self) -> tuple[Any, ...]:
        """What Python code was told of values in the data. Told the same, it does the same."""
        return tuple(self._told)

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Takes down a call that has been made."""
        name = plain_name(func)
        given = [*tensors_in(args), *tensors_in(kwargs.values())]
        constant = all(id(each) in self._constants for each in given) and name not in _FROM_PYTHON
        random = any(part in name for part in _RANDOM)
        if constant and not random and (given or name in _CONSTANTS):
            self._constants.update((id(each), each) for each in tensors_in((output,)))
        elif any(id(each) in self._constants for each in _overwritten(func, args, kwargs)):
            # Whatever else is a view of it is no longer known either.
            self._constants.clear()
        if name in _MOVING or name in _CONSTANTS:
            self._path.append((name, _as_text((*args, *kwargs.items()))))
        if constant and given:
            return
        if name in _TELLING:
            self._told.append(repr(output))
        elif name in _EXPORTING or name in ORDERING or name in _CUTTING or name in INDEXING:
            self.by_data = self.by_data or self._moves(name, args, kwargs)

    def _moves(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in INDEXING:
            return self._indexes_by_data(name, args, kwargs)
        if name in _CUTTING:
            return _cuts_rows(args, kwargs, _CUTTING[name])
        return True

    def _indexes_by_data(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        # x[i] = y names its index; others have it somewhere among their arguments.
        places = [args[1]] if name in ("__getitem__", "__setitem__") else [*args[1:], *kwargs.values()]
        index = [each for each in tensors_in(places) if not each.is_floating_point() and not each.is_complex()]
        moved = [each for each in tensors_in([*args, *kwargs.values()]) if not any(each is other for other in index)]
        if all(id(each) in self._constants for each in moved):
            return False
        return any(id(each) not in self._constants for each in index) or any(map(_holds_array, places))


def plain_name(func: Callable[..., Any]) -> str:
    """The function's name, without the underscore that says it works in place."""
    name: str = getattr(func, "__name__", "")
    return name if name.startswith("__") else name.removesuffix("_")


def _overwritten(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes in place."""
    name: str = getattr(func, "__name__", "")
    in_place = name in _OPERATORS_IN_PLACE if name.startswith("__") else name.endswith("_")
    return list(tensors_in([*(args[:1] if in_place else ()), kwargs.get("out")]))


def _cuts_rows(args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> bool:
    """Whether the dimension that is cut may hold samples: the last of several holds features."""
    if not args or not isinstance(args[0], Tensor):
        return True
    dim = kwargs.get("dim", args[place] if len(args) > place else 0)
    dimensions = args[0].dim()
    return dimensions < 2 or not isinstance(dim, int) or dim % dimensions != dimensions - 1


def _holds_array(value: Any) -> bool:
    """Whether an index is neither a tensor nor a list of integers, which is in the path."""
    if isinstance(value, tuple):
        return any(_holds_array(each) for each in value)
    unknown = isinstance(value, list) and not _is_of_integers(value)
    return unknown or (hasattr(value, "__array__") and not isinstance(value, Tensor))


def _as_text(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(_as_text(each) for each in value)})"
    known = isinstance(value, (int, slice, str, type(None), type(...)))
    return repr(value) if known or _is_of_integers(value) else type(value).__name__


def _is_of_integers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, int) for each in value)


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among these values, also those within tuples, lists and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
