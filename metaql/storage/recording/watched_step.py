"""Watches one forward and backward pass of somebody else's training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from metaql.errors import ModelStateError
from metaql.storage.recording.alignment import Alignment, align_backwards, probes
from metaql.storage.recording.capture import Capture, CapturedUse
from metaql.storage.recording.ends import Ends
from metaql.storage.recording.operations.operation import in_front
from metaql.storage.recording.row_moves import plain_name


@contextmanager
def noting_scale(note: Callable[[float], None]) -> Iterator[None]:
    """Within it, ``note`` is told the factor by which a GradScaler multiplies a loss."""
    original = GradScaler.scale

    def scale(self: GradScaler, outputs: Any) -> Any:
        note(self.get_scale())
        return original(self, outputs)

    GradScaler.scale = scale  # type: ignore[method-assign]
    try:
        yield
    finally:
        GradScaler.scale = original  # type: ignore[method-assign]


@dataclass(frozen=True)
class _Place:
    """An output of the forward pass: that of a use, by its number, or of a function that may have moved rows.

    ``axes`` are those of its dimensions in which samples may be.
    """

    edge: GradientEdge
    axes: tuple[int, ...]
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    use: int | None

    @property
    def leading(self) -> tuple[int, ...]:
        """The sizes of the dimensions in which samples may be."""
        return tuple(self.shape[axis] for axis in self.axes)

    def direction(self, mask: Tensor) -> Tensor:
        """Random values of the output's shape at the masked places of ``leading``, zero at all others."""
        # Of its own generator: the training's random numbers stay as they would be.
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(self.shape, generator=generator, dtype=self.dtype)
        in_front(direction, self.axes)[~mask] = 0.0
        return direction.to(self.device)


class WatchedStep(Capture):
    """A context around a forward and backward pass of a batch of so many ``samples``.

    After it, ``dys`` has dC/dy for each of ``uses`` (None where the loss does not depend on it), ``gradients`` what
    the backward pass brought to each parameter, and ``scale`` the factor that a GradScaler put on the loss. ``passes``
    counts the calls of ``loss.backward()``, and ``passes_of_uses`` says which of them came to each use.
    ``reordered`` says that data of all samples were put in another order within it.
    ``mixing`` says that batch norm in training mode is among the operations.
    ``unsettled`` is asked for a signature whether its alignments are still needed; they are then in ``alignments``, and
    the backward passes that find them run within ``around_probes``.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        samples: int,
        constants: Sequence[Tensor],
        unsettled: Callable[[tuple[Any, ...]], bool],
        mixing: bool,
        around_probes: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(parameters, samples, constants, on_use=self._watch, on_move=self._note_landmark)
        self.dys: list[Tensor | None] = []
        self.passes = 0
        self.passes_of_uses: list[set[int]] = []
        self.gradients: dict[str, Tensor] = {}
        self.scale = 1.0
        self.reordered = False
        self.alignments: list[Alignment | None] | None = None
        self._unsettled = unsettled
        self._mixing = mixing
        self._around_probes = around_probes
        self._path: list[_Place] = []
        self._ends = Ends(samples)
        self._handles: list[RemovableHandle] = []
        self._probing = False
        self._signature: tuple[Any, ...] | None = None

    @property
    def signature(self) -> tuple[Any, ...]:
        """All that alignments and layers depend on: of the pass as it was when it went backwards."""
        if self._signature is not None:
            return self._signature
        uses = tuple((use.weight, use.bias, use.use.operation.kind, use.leading, use.use.geometry) for use in self.uses)
        return self.samples, uses, self.rows.path

    def __enter__(self) -> Self:
        if not self._handles:
            self._handles = [
                parameter.register_hook(self._keep_gradient(name)) for name, parameter in self.parameters.items()
            ]
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def note_scale(self, scale: float) -> None:
        """Takes down the factor on the loss."""
        self.scale = scale

    def stop(self) -> None:
        """Removes what watched the pass."""
        for handle in self._handles:
            handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.backward:
            self.passes += 1
        if func is torch.Tensor.backward and self.uses:
            self._signature = None
            self._signature = self.signature
            if self.rows.by_data or self._unsettled(self._signature):
                self._examine(args[0])
        self.reordered = self.reordered or _reorders_batch(func, args, self.samples)
        output = super().__torch_function__(func, _types, args, kwargs)
        self._ends.note((*args, *(kwargs or {}).values()), output)
        return output

    def _examine(self, loss: Tensor) -> None:
        """Finds the alignments before the graph is used up."""
        self._probing = True
        for end in self._ends.of(loss):
            self._note_place(end, _leading_axes(end.shape, self.samples))
        try:
            with self._around_probes():
                self.alignments = self._align()
        except RuntimeError as error:
            if all(dy is None for dy in self.dys):
                raise
            raise several_passes(self.passes) from error
        finally:
            self._probing = False

    def _watch(self, captured: CapturedUse, output: Tensor) -> None:
        place = len(self.dys)
        self.dys.append(None)
        self.passes_of_uses.append(set())
        self._path.append(_Place(captured.edge, captured.use.axes, output.shape, output.dtype, output.device, place))

        def keep(dy: Tensor) -> None:
            if self._probing:
                return
            self.passes_of_uses[place].add(self.passes)
            before = self.dys[place]
            self.dys[place] = dy if before is None else before + dy

        self._handles.append(output.register_hook(keep))

    def _keep_gradient(self, name: str) -> Callable[[Tensor], None]:
        def keep(gradient: Tensor) -> None:
            gradient = gradient.detach().to_dense()
            if self.alignments is not None:
                # It will be compared, and DistributedDataParallel averages over the ranks in place.
                gradient = gradient.clone()
            before = self.gradients.get(name)
            self.gradients[name] = gradient if before is None else before + gradient

        return keep

    def _note_landmark(self, output: Any) -> None:
        """Rows that were moved have to be the samples again: tells a permutation that ends after the last use."""
        if isinstance(output, Tensor) and output.requires_grad and self.samples in output.shape:
            self._note_place(output, tuple(range(output.dim())))

    def _note_place(self, output: Tensor, axes: tuple[int, ...]) -> None:
        edge = get_gradient_edge(output)
        self._path.append(_Place(edge, axes, output.shape, output.dtype, output.device, None))

    def _align(self) -> list[Alignment | None]:
        """The alignment of each use, traced through all places of the forward pass."""
        edges = [place.edge for place in self._path]

        def gradients_from(number: int, mask: Tensor) -> Sequence[Tensor | None]:
            place = self._path[number]
            direction = [place.direction(mask)]
            dys = torch.autograd.grad([place.edge], edges, direction, retain_graph=True, allow_unused=True)
            return [None if dy is None else in_front(dy, each.axes) for each, dy in zip(self._path, dys, strict=True)]

        # Where rows may be anywhere, a few samples do not stand for the others.
        tried = range(self.samples) if self.rows.by_data else probes(self.samples)
        shapes = [place.leading for place in self._path]
        found = align_backwards(shapes, self.samples, gradients_from, tried, self._mixing)
        return [way for way, place in zip(found, self._path, strict=True) if place.use is not None]


def several_passes(number: int) -> ModelStateError:
    """The error for so many pairs of a forward and a backward pass."""
    return ModelStateError(
        f"{number} backward passes ran inside one recorder.step(...), each of a forward pass of its own. Put each such "
        "pair into a recorder.step(...) of its own, with its ids, and let reduction= say what factor its samples have. "
        "Gradients add up until the optimizer's step as before."
    )


def _reorders_batch(func: Callable[..., Any], args: tuple[Any, ...], samples: int) -> bool:
    """Whether a call puts rows of data that no gradient flows to, one for each sample, in another order."""
    name = plain_name(func)
    if name not in ("__getitem__", "index_select") or not isinstance(args[0], Tensor) or args[0].requires_grad:
        return False
    index = args[-1][0] if isinstance(args[-1], tuple) and args[-1] else args[-1]
    along_first = name == "__getitem__" or (len(args) == 3 and args[1] == 0)
    if not along_first or args[0].shape[:1] != (samples,) or not isinstance(index, (Tensor, list, np.ndarray)):
        return False
    order = torch.as_tensor(index)
    if order.shape != (samples,) or order.is_floating_point() or order.dtype == torch.bool:
        return False
    same = torch.arange(samples, device=order.device)
    return bool((order.sort().values == same).all()) and not bool((order == same).all())


def _leading_axes(shape: torch.Size, samples: int) -> tuple[int, ...]:
    """All dimensions but the last, which holds classes, where samples can be in those."""
    first = range(max(len(shape) - 1, 1))
    return tuple(first if any(shape[axis] % samples == 0 for axis in first) else range(len(shape)))
