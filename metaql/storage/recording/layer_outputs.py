"""What named modules put out in a forward pass, sample by sample.

Where the samples are in an output is not taken for granted: a few are run alone, and what the module puts out for them
has to be their part of the batch's; then all are run in another order, in which the parts have to come as well. Where
samples can't be cut out of their batch, the gradient of a sample's loss has to be zero at everybody else's part.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from metaql.errors import BatchError, ModelStateError, RecordingError, UnknownNameError
from metaql.storage.recording.alignment import Alignment, owns, probes
from metaql.storage.recording.batches import take, tensors
from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.row_moves import RowMoves
from metaql.storage.recording.self_check import disagreeing

# What the outputs of Hugging Face's models call the part that is meant.
_MEANT = ("last_hidden_state", "logits")
_LISTED = 40

GradientsOf = Callable[[int, Sequence[GradientEdge]], Sequence[Tensor | None]]


@dataclass(frozen=True)
class _Output:
    """A module's output, copied before anything could change it in place, and where its gradient would pass."""

    values: Tensor
    edge: GradientEdge | None


class LayerOutputs:
    """Watches modules of a model; UnknownNameError for names that it does not have."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._modules = _modules(model, names)
        self._ways: dict[tuple[Any, ...], Alignment] = {}
        self._newest: dict[str, Alignment] = {}
        self._outputs: dict[str, list[_Output]] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it one pass of the model is watched."""
        self._outputs = {name: [] for name in self._modules}
        handles = [module.register_forward_hook(self._note(name)) for name, module in self._modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def of_samples(
        self,
        losses: ModelLosses,
        batch: Any,
        samples: int,
        gradients_of: GradientsOf,
        precision: torch.dtype,
        rows: RowMoves,
    ) -> dict[str, Tensor]:
        """Each module's output in the pass that was watched, [samples, *shape], float32 on the CPU.

        ``gradients_of(k, edges)`` are those of sample k's own loss, and ``precision`` is the coarsest type that the
        pass computed in. Where the samples are is looked for once, as long as ``rows`` are moved alike.
        """
        outputs, self._outputs = {name: _only(name, each) for name, each in self._outputs.items()}, {}
        moved = rows.path
        unknown = [
            name
            for name, each in outputs.items()
            if rows.by_data or self._way(name, each.values, samples, moved) is None
        ]
        if unknown and samples > 1:
            passes = self._passes(losses, batch, samples)
            for name in unknown:
                compared = None if passes is None else [each[name] for each in passes]
                if compared is not None and all(one.numel() * samples == compared[-1].numel() for one in compared[:-1]):
                    way = _by_passes(name, outputs[name].values, samples, compared, precision)
                else:
                    tried = range(samples) if rows.by_data else probes(samples)
                    way = _by_gradients(name, outputs[name], samples, gradients_of, tried)
                self._ways[name, samples, outputs[name].values.shape, moved] = self._newest[name] = way
        found = {}
        for name, output in outputs.items():
            way = self._way(name, output.values, samples, moved) or Alignment(0)
            found[name] = _samples_first(way, output.values, samples).to("cpu", torch.float32)
        return found

    def _way(self, name: str, values: Tensor, samples: int, moved: int) -> Alignment | None:
        """Where the samples are in an output of this shape, if that is known. A single one is all there is."""
        if samples == 1:
            newest = self._newest.get(name)
            return newest if newest is not None and newest.axis < values.dim() else None
        return self._ways.get((name, samples, values.shape, moved))

    def _passes(self, losses: ModelLosses, batch: Any, samples: int) -> list[dict[str, Tensor]] | None:
        """Each module's outputs for a few samples alone, then for all in another order; None if none can be cut out."""
        found = []
        try:
            for chosen in (*([sample] for sample in probes(samples)), _another_order(samples)):
                with self.watching():
                    losses.evaluate(take(batch, samples, chosen))
                outputs, self._outputs = self._outputs, {}
                found.append({name: _only(name, each).values for name, each in outputs.items()})
        except (BatchError, RuntimeError, IndexError, KeyError, TypeError, ValueError):
            return None
        return found

    def _note(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen = self._outputs[name]
            # A second one is an error; it need not be copied for that.
            seen.append(seen[0] if seen else _copied(name, output))

        return note


def _modules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise RecordingError(
            f"embeddings is a list of names of modules, such as ['layer4'], not {names!r}. The name of the whole model "
            "is ''."
        )
    known = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            listed = ", ".join(repr(each) for each in list(known)[:_LISTED]) + (", …" if len(known) > _LISTED else "")
            raise UnknownNameError(f"embeddings: the model has no module '{name}'.{hint} The modules are: {listed}.")
    return {name: known[name] for name in names}


def _copied(name: str, output: Any) -> _Output:
    found = _tensor(output)
    if found is None or not found.is_floating_point() or found.layout != torch.strided or not found.dim():
        what = f"a {type(output).__name__}" if found is None else f"a {found.dtype} tensor of shape {list(found.shape)}"
        raise RecordingError(
            f"embeddings: module '{name}' puts out {what}, which is no tensor of floats with a part for each sample. "
            "Name another module."
        )
    edge = get_gradient_edge(found) if found.requires_grad else None
    return _Output(found.detach().clone(), edge)


def _tensor(output: Any) -> Tensor | None:
    """The tensor that is meant: the output itself, or the first in it."""
    for meant in _MEANT:
        value = output.get(meant) if isinstance(output, Mapping) else getattr(output, meant, None)
        if isinstance(value, Tensor):
            return value
    if is_dataclass(output) and not isinstance(output, Mapping):
        output = [getattr(output, field.name) for field in fields(output)]
    return next(iter(tensors(output)), None)


def _only(name: str, outputs: Sequence[_Output]) -> _Output:
    if len(outputs) == 1:
        return outputs[0]
    what = f"is called {len(outputs)} times in a pass" if outputs else "was not called when the model ran"
    raise RecordingError(f"embeddings: module '{name}' {what}. Name a module that is called once for each batch.")


def _by_passes(name: str, values: Tensor, samples: int, passes: Sequence[Tensor], precision: torch.dtype) -> Alignment:
    """Where the samples are in an output, if that gives a few of them what they get alone, and all in any order."""
    *alone, shuffled = passes
    ways = [way for way in _every_way(values.shape, samples) if _agrees(way, values, samples, alone, precision)]
    order = _another_order(samples)
    if len(ways) == 1 and shuffled.shape == values.shape:
        expected, got = (_samples_first(ways[0], each, samples) for each in (values, shuffled))
        if _same(got, expected[order], precision):
            return ways[0]
    raise _no_place(name, values, samples)


def _by_gradients(
    name: str, output: _Output, samples: int, gradients_of: GradientsOf, tried: Sequence[int]
) -> Alignment:
    """Where the samples are in an output, if the losses of those that are tried depend on their own parts alone."""
    shape, seen = tuple(output.values.shape), False
    ways = _every_way(shape, samples)
    for sample in tried:
        dy = None if output.edge is None else gradients_of(sample, [output.edge])[0]
        if dy is not None and bool(dy.any()):
            seen = True
            ways = [way for way in ways if owns(way, dy, shape, samples, sample)]
    if seen and len(ways) == 1:
        return ways[0]
    raise _no_place(name, output.values, samples)


def _no_place(name: str, values: Tensor, samples: int) -> ModelStateError:
    return ModelStateError(
        f"embeddings: which part of the output of module '{name}', of shape {list(values.shape)}, is which of the "
        f"{samples} samples' can't be told: run alone, or in another order, they do not give a part of it each. "
        "Modules that mix or move samples, or put out something for the batch as a whole, can't be kept; name another."
    )


def _every_way(shape: Sequence[int], samples: int) -> list[Alignment]:
    return [
        Alignment(axis, samples_first)
        for axis, size in enumerate(shape)
        if size and size % samples == 0
        for samples_first in ((True,) if size == samples else (True, False))
    ]


def _another_order(samples: int) -> list[int]:
    """An order of all samples that looks like none that a model would give them."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(samples)).tolist()


def _agrees(way: Alignment, values: Tensor, samples: int, alone: Sequence[Tensor], precision: torch.dtype) -> bool:
    """Whether this way gives the samples that were run alone the parts that they then had."""
    shape = list(values.shape)
    shape[way.axis] //= samples
    if any(list(one.shape) != shape for one in alone):
        return False
    # The order of a sample's own positions is the same in both.
    return _same(
        _samples_first(way, values, samples)[probes(samples)], torch.stack([one.flatten() for one in alone]), precision
    )


def _same(got: Tensor, expected: Tensor, precision: torch.dtype) -> bool:
    """Whether rows are the same but for rounding; what is not a number is so in both."""
    coarsest = max((expected.dtype, precision), key=lambda dtype: torch.finfo(dtype).eps)
    return not disagreeing({"": got.nan_to_num()}, {"": expected.nan_to_num()}, coarsest)


def _samples_first(way: Alignment, values: Tensor, samples: int) -> Tensor:
    """[samples, *shape], where the shape lacks the samples' dimension if there is nothing else in it."""
    shape = list(values.shape)
    shape[way.axis] //= samples
    if shape[way.axis] == 1:
        del shape[way.axis]
    return way.apply(values, values.dim(), samples).reshape(samples, *shape)
