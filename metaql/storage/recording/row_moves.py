"""Whether a forward pass puts rows where another one did, of a batch of the same shapes.

A pass is followed call by call: which function, on what earlier results, with which numbers. Whatever Python code
decided by looking at the data then shows, for it called something else, or with other numbers, or on other results.
What does not show is an index made of data, save where it picks among values that no gradient flows to. An index
that no data went into (positions, buckets of distances, a causal mask) moves rows alike in every such batch. So
what is constant, the model's own tensors and what is made of them alone, is followed too; all else counts as data,
random numbers included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from numbers import Integral
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
# Functions that hand rows to Python out of sight, which may put them together in any order.
_SCATTERING = frozenset(("__iter__", "__reversed__"))
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
    """Follows the torch functions of one pass; ``constants`` are tensors that are the same for every batch.

    ``by_data`` is set once an index made of data may have moved rows that gradients flow to; with ``follow_all`` any
    rows.
    """

    def __init__(self, constants: Iterable[Tensor], follow_all: bool = False) -> None:
        self.by_data = False
        self._follow_all = follow_all
        self._path = 0
        # Held, so that no other tensor gets the same id.
        self._constants = {id(each): each for each in constants}
        # Which call a tensor came from, by its id. Where one is gone and another has its id, passes look
        # different that are not, or, as rows came from somewhere else all the same, alike in this one place.
        self._numbers: dict[int, int] = {}
        self._next = count()
        self._unseen = 0

    @property
    def path(self) -> int:
        """Stands for all the calls that were followed; where it differs, so may the places of rows."""
        return self._path

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Takes down a call that has been made."""
        name = plain_name(func)
        given = [*tensors_in(args), *tensors_in(kwargs.values())]
        constant = all(id(each) in self._constants for each in given) and name not in _FROM_PYTHON
        constant = constant and bool(given or name in _CONSTANTS) and not any(part in name for part in _RANDOM)
        changed = _overwritten(func, args, kwargs)
        made = [*tensors_in((output,)), *changed]
        if constant:
            self._constants.update((id(each), each) for each in made)
        elif any(id(each) in self._constants for each in changed):
            # Whatever else is a view of it is no longer known either.
            self._constants.clear()
        followed = self._follow_all or any(each.requires_grad for each in (*given, *made))
        if made and (constant or followed):
            self._path = hash((self._path, func, self._form(args), self._form(kwargs)))
            self._numbers.update((id(each), next(self._next)) for each in made)
        if followed and not constant:
            self.by_data = self.by_data or self._moves(name, args, kwargs)

    def _form(self, value: Any) -> Any:
        """All of an argument that says where rows go, hashable: not the values in tensors, nor fractions."""
        if isinstance(value, Tensor):
            followed = self._follow_all or value.requires_grad or id(value) in self._constants
            return value.shape, self._number(value) if followed else None
        if isinstance(value, (tuple, list)):
            return tuple(self._form(each) for each in value)
        if isinstance(value, dict):
            return tuple((name, self._form(each)) for name, each in value.items())
        if isinstance(value, slice):
            return tuple(self._form(each) for each in (value.start, value.stop, value.step))
        if isinstance(value, Integral):
            return int(value)
        return value if isinstance(value, str) else type(value)

    def _number(self, value: Tensor) -> int:
        if id(value) not in self._numbers:
            self._numbers[id(value)] = next(self._next)
            # Made out of sight: of one there is no order, of several nothing here would tell it.
            self._unseen += not value.is_leaf
            self.by_data = self.by_data or self._unseen > 1
        return self._numbers[id(value)]

    def _moves(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        if name in INDEXING:
            return self._indexes_by_data(name, args, kwargs)
        return name in ORDERING or name in _SCATTERING

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


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether the function changes what it is called with first."""
    name: str = getattr(func, "__name__", "")
    return name in _OPERATORS_IN_PLACE if name.startswith("__") else name.endswith("_")


def _overwritten(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors that a call changes in place."""
    return list(tensors_in([*(args[:1] if is_in_place(func) else ()), kwargs.get("out")]))


def _holds_array(value: Any) -> bool:
    """Whether an index holds numbers that are neither Python's own nor in a tensor."""
    if isinstance(value, (tuple, list)):
        return any(_holds_array(each) for each in value)
    return hasattr(value, "__array__") and not isinstance(value, (Tensor, Integral))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among these values, also those within tuples, lists and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())
