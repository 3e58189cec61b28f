"""Watches a forward pass and notes every operation in which a trainable parameter takes part.

Operations are captured, not modules: a gradient of W is a sum over the uses of W, wherever they are, so
modules used twice, tied weights and functional calls need no case of their own. A view of a parameter is the
parameter, in part.
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
from metaql.storage.recording.lookups import Lookups
from metaql.storage.recording.operations import OPERATIONS, Use
from metaql.storage.recording.operations.views import is_parameter, root
from metaql.storage.recording.row_moves import INDEXING, ORDERING, RowMoves, is_in_place, plain_name, tensors_in

# What leaves a parameter's gradient as it is, if it is called with numbers and types beside the parameter.
SHIFTS = frozenset([
    torch.add, torch.Tensor.add, torch.sub, torch.Tensor.sub,
    torch.Tensor.to, torch.Tensor.type, torch.Tensor.float, torch.Tensor.double, torch.Tensor.half,
    torch.Tensor.bfloat16,
])  # fmt: skip
# Operations whose factors depend on the parameter's own value; a shifted one has another.
READS_PARAMETERS = frozenset((torch.div, torch.Tensor.div, torch.true_divide))


@dataclass(frozen=True)
class CapturedUse:
    """A use of the parameters named ``weight`` and ``bias``.

    ``edge`` is where dC/dy will pass, ``leading`` the sizes of y's dimensions that hold samples and positions.
    """

    use: Use
    weight: str | None
    bias: str | None
    edge: GradientEdge
    leading: tuple[int, ...]
    version: int

    def require_unchanged(self) -> None:
        """Raises if the input was overwritten since; its values are needed for the factors."""
        if self.use.operation.reads_input and self.use.inputs._version != self.version:
            name = self.weight or self.bias
            raise ModelStateError(
                f"The input of the operation that uses '{name}' was modified in place after it, so its gradient "
                "can't be computed (plain autograd fails on this too). Replace the in-place operation."
            )

    def lead(self, dy: Tensor | None) -> Tensor | None:
        """dC/dy with the ``leading`` dimensions in front."""
        return None if dy is None else self.use.lead(dy)


@dataclass(eq=False)
class Capture(TorchFunctionMode):
    """A context in which uses of ``parameters`` (name => parameter) by a batch of so many ``samples`` are noted.

    ``on_use`` is called at once with each use and its output, before anything can change it in place, and ``on_move``
    with what functions return that may permute rows. After it,
    ``uses`` holds the captured ones in forward order, and ``other`` names, for each parameter that took part in
    something without factors, the function it was. ``rows`` says whether what holds for one batch holds for the next
    of the same shapes; ``constants`` are tensors beside the parameters that are the same for every batch.
    ``follow_all`` has it look at values that no gradient flows to, too.
    """

    parameters: Mapping[str, torch.nn.Parameter]
    samples: int
    constants: Sequence[Tensor] = ()
    on_use: Callable[[CapturedUse, Tensor], None] | None = None
    on_move: Callable[[Any], None] | None = None
    follow_all: bool = False
    uses: list[CapturedUse] = field(default_factory=list)
    other: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()
        self.rows = RowMoves([*self.parameters.values(), *self.constants], self.follow_all)
        self._names = {id(parameter): name for name, parameter in self.parameters.items()}
        self._lookups = Lookups()
        # Known by their ids, and so kept alive: what is made of parameters alone, and copies of a parameter for
        # every sample, which are views of it but no uses.
        self._constants: dict[int, Tensor] = {}
        self._copies: dict[int, Tensor] = {}
        # And a parameter plus a number, or in another precision, which has the same gradient: id => that, parameter.
        self._shifted: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = list(tensors_in((*args, *kwargs.values())))
        names = self._tracked(tensors)
        if (names or self._lookups.any(tensors)) and (inner := _see_through(func)) is not None:
            with self:
                return inner(*args, **kwargs)
        constant = bool(tensors) and all(self._is_constant(each) for each in tensors)
        if is_in_place(func) and tensors:
            for use in self._lookups.before_change(tensors[0]):
                self._add(*use)
        output = func(*args, **kwargs)
        self.rows.note(func, args, kwargs, output)
        if not names and self.on_move is not None and may_permute_rows(func, args):
            self.on_move(output)
        if self._lookups.any(tensors) and self._makes_gradients(output):
            for use in self._lookups.met(func, tensors, kwargs, output):
                self._add(*use)
        captured = self._capture(func, args, kwargs, output) if names else set()
        if names:
            self._follow_shift(func, args, kwargs, output)
        self._follow(tensors, output, constant, bool(captured))
        if (names := names - captured) and self._makes_gradients(output):
            self.other.update(dict.fromkeys(names, _describe(func)))
        return output

    def _tracked(self, tensors: Iterable[Tensor]) -> set[str]:
        """The recorded parameters among these, whole or in part."""
        found = {self._names.get(id(root(self._unshifted(each)))) for each in tensors if id(each) not in self._copies}
        return {name for name in found if name is not None}

    def _unshifted(self, value: Any) -> Any:
        """The parameter, for one that was shifted; anything else as it is."""
        return self._shifted[id(value)][1] if id(value) in self._shifted else value

    def _follow_shift(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Remembers a parameter plus a number, as in (1 + weight) * x, or in another precision."""
        own = self._unshifted(args[0]) if args else None
        if is_in_place(func):
            self._shifted.pop(id(output), None)
        elif func in SHIFTS and not kwargs and isinstance(own, torch.nn.Parameter) and isinstance(output, Tensor):
            plain = output.is_floating_point() and own.is_floating_point() and output.shape == own.shape
            if plain and output.grad_fn is not None and not any(isinstance(each, Tensor) for each in args[1:]):
                self._shifted[id(output)] = output, own

    def _is_constant(self, tensor: Tensor) -> bool:
        """Whether it is made of parameters alone, so that it has no samples."""
        return id(tensor) in self._constants or (is_parameter(tensor) and id(tensor) not in self._copies)

    def _capture(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> set[str]:
        """Notes what the call uses with factors, and returns the names that this accounts for."""
        binder = OPERATIONS.get(func)
        first = output[0] if isinstance(output, tuple) else output
        if binder is None or not isinstance(first, Tensor) or not first.requires_grad:
            return set()
        if is_parameter(first) and self.samples > 1:
            # As many as before: it is the parameter still, and has yet to meet the samples.
            return set()
        if func not in READS_PARAMETERS:
            args = tuple(self._unshifted(each) for each in args)
            kwargs = {name: self._unshifted(each) for name, each in kwargs.items()}
        return {name for use in binder(*args, **kwargs) for name in self._note(use, first)}

    def _note(self, use: Use, output: Tensor) -> set[str]:
        """Keeps a use, unless no sample can have a part in it, and returns the names it accounts for."""
        own = {self._names[id(each)] for each in (use.weight, use.bias) if id(each) in self._names}
        without_samples = self.samples > 1 and self._is_constant(use.inputs)
        if not own or without_samples or not own.isdisjoint(self._tracked([use.inputs])):
            return set()
        if self.samples == 1 or not self._lookups.keep(use, output):
            self._add(use, output)
        return own

    def _add(self, use: Use, output: Tensor) -> None:
        weight, bias = (self._names.get(id(each)) for each in (use.weight, use.bias))
        leading = tuple(output.shape[axis] for axis in use.axes)
        captured = CapturedUse(use, weight, bias, get_gradient_edge(output), leading, use.inputs._version)
        self.uses.append(captured)
        if self.on_use is not None:
            self.on_use(captured, output)

    def _follow(self, tensors: Sequence[Tensor], output: Any, constant: bool, captured: bool) -> None:
        """Remembers what is made of parameters alone, and what is made of their copies."""
        if constant and not captured:
            self._constants |= {id(each): each for each in tensors_in([output]) if not is_parameter(each)}
        elif captured or any(id(each) in self._copies for each in tensors):
            self._copies |= {id(each): each for each in tensors_in([output]) if is_parameter(each)}

    def _makes_gradients(self, output: Any) -> bool:
        return any(each.grad_fn is not None and not self._tracked([each]) for each in tensors_in([output]))


def may_permute_rows(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """Whether a call takes its rows from places that a tensor or a list says."""
    name = plain_name(func)
    if name not in ("__getitem__", "__setitem__"):
        # The rows of a table that is looked up are no samples.
        return (name in INDEXING and name != "embedding") or name in ORDERING or name in ("roll", "flip")
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
