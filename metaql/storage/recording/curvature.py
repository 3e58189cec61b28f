"""Gathers second moments of gradients over data, while every position is there and before any layer is laid out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from metaql.errors import BatchError, RecordingError, UnsupportedParameterError
from metaql.methods.curvature import DIAGONAL, EKFAC, KFAC, LayerCurvature, as_vectors
from metaql.methods.diagonal import Diagonal
from metaql.methods.kronecker import Basis, Squares, basis
from metaql.methods.moments import Moments
from metaql.storage.blocks import Block, Factored, Factors, Full, cut, lay_out, owners
from metaql.storage.group import Group
from metaql.storage.manifest import CROSS_ENTROPY
from metaql.storage.recording.batches import identified, move
from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.sample_gradients import BatchGradients, SampleGradients
from metaql.storage.recording.sampled_labels import with_sampled_labels
from metaql.storage.schema import FACTORED, Layer

METHODS = (EKFAC, KFAC, DIAGONAL)
SAMPLED, RECORDED = "sampled", "recorded"
# Kinds of layers whose Fisher matrix is near a Kronecker product.
_KRONECKER = ("linear", "conv")
# Gradients that have to be laid out are so this many bytes at a time.
_BYTES = 64 << 20

Sum = Moments | Squares | Diagonal


@dataclass(frozen=True)
class Fitted:
    """Each layer's curvature by its name, and how many samples it is of."""

    layers: Mapping[str, LayerCurvature]
    samples: int


def require_known(method: str, labels: str, losses: str) -> None:
    """RecordingError unless this is a method, and labels that it can have with these losses."""
    if method not in METHODS:
        raise RecordingError(f"method can be {', '.join(map(repr, METHODS))}; not {method!r}.")
    if labels not in (SAMPLED, RECORDED):
        raise RecordingError(f"labels can be '{SAMPLED}' or '{RECORDED}'; not {labels!r}.")
    if labels == SAMPLED and losses != CROSS_ENTROPY:
        raise RecordingError(
            f"labels='{SAMPLED}' draws classes from the model's own predictions, and nothing here knows what your "
            f"losses= predict. Pass labels='{RECORDED}' for the empirical Fisher matrix, of the data's own targets."
        )


class CurvatureGatherer:
    """Runs a model over data and fits the curvature of its recorded layers."""

    def __init__(
        self,
        losses: ModelLosses,
        parameters: Mapping[str, nn.Parameter],
        layers: tuple[Layer, ...],
        dtype: str,
        group: Group,
    ) -> None:
        self._layers = tuple(_in_factors(layer) for layer in layers)
        self._model = losses.model
        self._device = next(iter(parameters.values())).device
        self._gradients = SampleGradients(losses, parameters, dtype, self._layers)
        self._dtype = torch.float64 if dtype == "float64" else torch.float32
        self._group = group
        self._sweeps = 0

    def fit(self, data: Any, method: str, labels: str, batch_size: int) -> Fitted:
        """The curvature over data, which EK-FAC reads twice: for the bases, then for the eigenvalues in them."""
        if method == EKFAC and isinstance(data, Iterator):
            raise BatchError(
                "'ekfac' reads the data twice, and this is an iterator, which is used up by then. Pass a map-style "
                "Dataset or a list of (ids, batch), or method='kfac', which reads it once."
            )

        def sweep(sums: dict[str, Sum], what: str) -> dict[str, Sum]:
            return self._sweep(data, labels, batch_size, sums, what)

        found = sweep({layer.name: _first_sum(layer, method) for layer in self._layers}, "curvature")
        samples = max((each.samples for each in found.values()), default=0)
        if not samples:
            raise BatchError("The data hold no sample to gather curvature of.")
        moments = {name: each for name, each in found.items() if isinstance(each, Moments)}
        bases = self._group.lead(lambda: {name: basis(each, name, self._dtype) for name, each in moments.items()})
        if method == EKFAC:
            layers = {layer.name: layer for layer in self._layers}
            squares: dict[str, Sum] = {
                name: Squares(layers[name].groups, layers[name].has_bias, each)
                for name, each in bases.items()
                if each is not None
            }
            found |= sweep(squares, "eigenvalues")
        return Fitted({layer.name: _fitted(layer, found[layer.name], bases) for layer in self._layers}, samples)

    def _sweep(self, data: Any, labels: str, batch_size: int, sums: dict[str, Sum], what: str) -> dict[str, Sum]:
        """Adds all data to the sums, of all ranks together."""
        # Drawn anew each time: on the labels that the bases were fitted to, their noise would pass for curvature.
        self._sweeps += 1
        generator = torch.Generator().manual_seed(self._sweeps * self._group.size + self._group.rank)
        batches, total = identified(data, batch_size, self._group)
        hidden = None if self._group.leads else True
        with tqdm(total=total, desc=f"gather {what}", unit="sample", disable=hidden) as progress:
            for ids, batch in batches:
                self._add(batch, ids, labels, generator, sums)
                progress.update(len(ids) * self._group.size)
        return reduce(_merged, self._group.gather(sums))

    def _add(
        self, batch: Any, ids: np.ndarray, labels: str, generator: torch.Generator, sums: Mapping[str, Sum]
    ) -> None:
        batch = move(batch, self._device)
        if labels == SAMPLED:
            batch = with_sampled_labels(self._model, batch, generator)
        result = self._gradients.of(batch, ids)
        with torch.no_grad():
            for layer in self._layers:
                if layer.name in sums:
                    _add_block(sums[layer.name], layer, result)


def _in_factors(layer: Layer) -> Layer:
    """The layer with every position of its own, however the store keeps it."""
    return replace(layer, layout=FACTORED, unfold=None) if layer.kind in _KRONECKER else layer


def _first_sum(layer: Layer, method: str) -> Sum:
    if layer.kind not in _KRONECKER:
        return Diagonal()
    return Squares(layer.groups, layer.has_bias, None) if method == DIAGONAL else Moments(layer.groups, layer.has_bias)


def _merged(one: dict[str, Sum], other: dict[str, Sum]) -> dict[str, Sum]:
    for name, each in other.items():
        # Both are of the same kind, as both ranks have the same layers.
        one[name].merge(each)  # type: ignore[arg-type]
    return one


def _add_block(total: Sum, layer: Layer, result: BatchGradients) -> None:
    block = result.blocks[layer.name]
    if isinstance(total, Diagonal):
        _add_squares(total, layer, block)
        return
    if isinstance(total, Moments) and not result.replayed.isdisjoint(each.name for each in layer.parameters):
        raise UnsupportedParameterError(
            f"Layer '{layer.name}' is used in a way that leaves no factors in this batch, so its curvature is no "
            "product of two. Gather method='diagonal', or record without the layer, by layers=."
        )
    assert isinstance(block, Factored)
    split = (block.samples, len(block.prefix) // block.samples)
    total.add(block.suffix.unflatten(0, split), block.prefix.unflatten(0, split))


def _add_squares(total: Diagonal, layer: Layer, block: Block) -> None:
    if isinstance(block, Factored) and layer.kind == "embedding":
        assert layer.input_width is not None
        assert layer.output_width is not None
        shape = (layer.input_width, layer.output_width)
        total.add_rows(block.suffix, owners(block), block.prefix, shape, block.samples)
    elif isinstance(block, Full):
        total.add(block.gradient)
    else:
        for some in _pieces(block, max(1, _BYTES // (8 * layer.width))):
            total.add(lay_out(layer, some))


def _pieces(block: Factors, size: int) -> Iterator[Factors]:
    """The block in so many samples each."""
    for begin in range(0, block.samples, size):
        part = slice(begin, min(begin + size, block.samples))
        yield block.each(partial(cut, part=part))


def _fitted(layer: Layer, found: Sum, bases: Mapping[str, Basis | None]) -> LayerCurvature:
    own = bases.get(layer.name)
    of_basis = None if own is None else own.eigenvalues
    eigenvalues = of_basis if isinstance(found, Moments) else found.mean
    if eigenvalues is None:
        # No sample came by here.
        return LayerCurvature(torch.zeros(1, 1, layer.width, dtype=torch.float64), None, bias=False)
    if own is None:
        flat = as_vectors(eigenvalues, layer.has_bias) if isinstance(found, Squares) else eigenvalues
        return LayerCurvature(flat.reshape(1, 1, -1), None, bias=False)
    return LayerCurvature(eigenvalues, own, layer.has_bias)
