"""Watches a forward pass and notes every operation in which a trainable parameter takes part.

Operations are captured, not modules: a gradient of W is a sum over the uses of W, wherever they are, so
modules used twice, tied weights and functional calls need no case of their own.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode

from metaql.errors import ModelStateError
from metaql.storage.recording.operations import OPERATIONS, Use
from metaql.storage.recording.row_moves import INDEXING, ORDERING, RowMoves, plain_name


@dataclass(frozen=True)
class CapturedUse:
    """A use of the parameters named ``weight`` and ``bias``; ``edge`` is where dC/dy will pass."""

    use: Use
    weight: str | None
    bias: str | None
    edge: GradientEdge
    version: int

    def require_unchanged(self) -> None:
        """Raises if the input was overwritten since; its values are needed for the suffix."""
        if self.use.inputs._version != self.version:
            name = self.weight or self.bias
            raise ModelStateError(
                f"The input of the operation that uses '{name}' was modified in place after it, so its gradient "
                "can't be computed (plain autograd fails on this too). Replace the in-place operation."
            )


@dataclass(eq=False)
class Capture(TorchFunctionMode):
    """A context in which uses of ``parameters`` (name => parameter) are noted.

    ``on_use`` is called at once with each use and its output, before anything can change it in place, and ``on_move``
    with what functions return that may permute rows. After it,
    ``uses`` holds the captured ones in forward order, and ``other`` names, for each parameter that took part in
    something without factors, the function it was. ``rows`` says whether what holds for one batch holds for the next
    of the same shapes; ``constants`` are tensors beside the parameters that are the same for every batch.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    constants: Sequence[Tensor] = ()
    on_use: Callable[[CapturedUse, Tensor], None] | None = None
    on_move: Callable[[Any], None] | None = None
    uses: list[CapturedUse] = field(default_factory=list)
    other: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.rows = RowMoves([*self.parameters.values(), *self.constants])
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        names = self._tracked(args) | self._tracked(kwargs.values())
        if not names:
            output = func(*args, **kwargs)
            self.rows.note(func, args, kwargs, output)
            if self.on_move is not None and may_permute_rows(func, args):
                self.on_move(output)
            return output
        if (inner := _see_through(func)) is not None:
            with self:
                return inner(*args, **kwargs)
        output = func(*args, **kwargs)
        self.rows.note(func, args, kwargs, output)
        binder = OPERATIONS.get(func)
        use = binder(*args, **kwargs) if binder else None
        if use is not None:
            names -= self._note(use, output)
        if names and self._makes_gradients(output):
            self.other.update(dict.fromkeys(names, _describe(func)))
        return output

    def _tracked(self, values: Iterable[Any]) -> set[str]:
        found: set[str] = set()
        for value in values:
            if isinstance(value, Tensor):
                name = self._names.get(id(value))
                if name is not None:
                    found.add(name)
            elif isinstance(value, (list, tuple)):
                found |= self._tracked(value)
        return found

    def _note(self, use: Use, output: Tensor) -> set[str]:
        """Keeps the use, and returns the names it accounts for."""
        weight = self._names.get(id(use.weight))
        bias = self._names.get(id(use.bias))
        if use.inputs is not use.weight and output.requires_grad:
            captured = CapturedUse(use, weight, bias, get_gradient_edge(output), use.inputs._version)
            self.uses.append(captured)
            if self.on_use is not None:
                self.on_use(captured, output)
        accounted = {name for name in (weight, bias) if name is not None}
        return accounted - self._tracked([use.inputs])

    def _makes_gradients(self, output: Any) -> bool:
        if isinstance(output, Tensor):
            return output.requires_grad and id(output) not in self._names
        return isinstance(output, (list, tuple)) and any(self._makes_gradients(item) for item in output)


def may_permute_rows(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call takes its rows from places that a tensor or a list says."""
    name = plain_name(func)
    if name not in ("__getitem__", "__setitem__"):
        return name in INDEXING or name in ORDERING or name in ("roll", "flip")
    if len(args) < 2:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(each, (Tensor, list)) or hasattr(each, "__array__") for each in index)


def _describe(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", repr(func))
    return name if name != "__get__" else "a property such as .T"


@cache
def _see_through(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """A Python function of torch.nn.functional that shows the torch functions it calls, or None.

    Such functions hand themselves over to a mode as a whole. This is the same function, except that its
    question whether anybody wants to take over is answered with no.
    """
    if not isinstance(func, types.FunctionType) or func.__module__ != "torch.nn.functional":
        return None
    questions = [name for name in func.__code__.co_names if name.startswith("has_torch_function")]
    if not questions:
        return None
    answers = dict.fromkeys(questions, lambda *_: False)
    inner = types.FunctionType(
        func.__code__, {**func.__globals__, **answers}, func.__name__, func.__defaults__, func.__closure__
    )
    inner.__kwdefaults__ = func.__kwdefaults__
    return inner
