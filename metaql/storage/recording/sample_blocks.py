"""The blocks a store keeps for one batch, made from aligned uses and, where those fall short, from gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from metaql.errors import NotFiniteError, UnsupportedParameterError
from metaql.storage.blocks import Block, Factored, Full, Tied, owners, whole
from metaql.storage.recording.aligned import AlignedUse
from metaql.storage.recording.factors import Suffixes, factors
from metaql.storage.recording.layering import FACTORED_KINDS, geometry
from metaql.storage.schema import FACTORED, Layer, Parameter, parts


def parameter_gradient(
    name: str, shape: tuple[int, ...], uses: Sequence[AlignedUse], chosen: Sequence[int] | None = None
) -> Tensor:
    """The gradient of a parameter as the sum over its uses, [n or the chosen samples, elements]."""
    parts = [use.weight_gradient(shape, chosen) for use in uses if use.captured.weight == name]
    parts += [use.bias_gradient(chosen) for use in uses if use.captured.bias == name]
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def make_blocks(
    layers: Iterable[Layer], uses: Sequence[AlignedUse], replayed: Mapping[str, Tensor], samples: int
) -> dict[str, Block]:
    """Each layer's gradients of a batch in the layer's layout, by its name; the tensors may be the model's own.

    ``replayed`` holds whole gradients [n, *shape] of parameters that the uses do not give; a parameter in
    neither has none. Layers with the same input have one suffix.
    """
    suffixes: Suffixes = {}
    return {layer.name: _block(layer, uses, replayed, samples, suffixes) for layer in layers}


def _block(
    layer: Layer, uses: Sequence[AlignedUse], replayed: Mapping[str, Tensor], samples: int, suffixes: Suffixes
) -> Block:
    if layer.kind in FACTORED_KINDS and layer.layout == FACTORED:
        if layer.parameters[0].name in replayed:
            return _spelled_out(layer, [replayed[each.name] for each in layer.parameters], samples)
        own = [use for use in uses if use.captured.weight == layer.parameters[0].name]
        return whole([_factored(part, own, samples, suffixes) for part in parts(layer)])
    if layer.layout == FACTORED:
        (parameter,) = layer.parameters
        return _where_any(layer, _gradient(parameter, uses, replayed), samples)
    gradients = [_gradient(parameter, uses, replayed) for parameter in layer.parameters]
    widths = [parameter.width for parameter in layer.parameters]
    like = torch.zeros(samples, 0) if all(each is None for each in gradients) else _first(gradients)
    filled = [
        like.new_zeros(samples, width) if gradient is None else gradient
        for gradient, width in zip(gradients, widths, strict=True)
    ]
    return Full(torch.cat(filled, dim=1) if len(filled) > 1 else filled[0])


def _first(gradients: Sequence[Tensor | None]) -> Tensor:
    return next(gradient for gradient in gradients if gradient is not None)


def _gradient(parameter: Parameter, uses: Sequence[AlignedUse], replayed: Mapping[str, Tensor]) -> Tensor | None:
    """[n, elements], or None where the parameter took no part."""
    if parameter.name in replayed:
        values = replayed[parameter.name]
        return values.reshape(len(values), -1)
    if any(parameter.name in (use.captured.weight, use.captured.bias) for use in uses):
        return parameter_gradient(parameter.name, parameter.shape, uses)
    return None


def require_finite(blocks: Mapping[str, Block], ids: np.ndarray, dtype: str, scale: Tensor | None = None) -> None:
    """Raises if a gradient is NaN or infinite, or will be in the store's ``dtype``, naming the layer and the sample.

    It will be stored times the sample's ``scale`` [n].
    """
    largest = 1.0 if scale is None else float(scale.abs().max())
    # Suffixes that were looked at: several layers may have one.
    seen: set[int] = set()
    for name, block in blocks.items():
        for part in (block,) if not isinstance(block, Tied) else (block.projection, block.table):
            if not _is_small(part, largest, dtype, seen):
                _require_finite(name, _as_stored(part, scale, dtype), ids)


def _is_small(block: Factored | Full, scale: float, dtype: str, seen: set[int]) -> bool:
    """Whether all numbers, scaled, lie well within what both the store's type and their own can hold."""
    if isinstance(block, Full):
        return _is_within(block.gradient, scale, dtype)
    if id(block.suffix) not in seen:
        seen.add(id(block.suffix))
        if not _is_within(block.suffix, 1.0, dtype):
            return False
    return _is_within(block.prefix, scale, dtype)


def _is_within(values: Tensor, scale: float, dtype: str) -> bool:
    if not values.numel() or not values.is_floating_point():
        return True
    low, high = (float(each) for each in values.aminmax())
    limit = min(torch.finfo(values.dtype).max, torch.finfo(getattr(torch, dtype)).max)
    # As NaN it is neither.
    return bool(np.isfinite(low + high)) and max(-low, high, 1.0) * max(scale, 1.0) < limit / 2


def _as_stored(block: Factored | Full, scale: Tensor | None, dtype: str) -> Factored | Full:
    """Numbers of float64 as the store keeps them; of the other types all fit into each."""

    def change(values: Tensor) -> Tensor:
        return values.to(getattr(torch, dtype)) if values.dtype == torch.float64 else values

    factors = torch.ones(block.samples) if scale is None else scale
    if isinstance(block, Full):
        return Full(change(block.gradient * factors.to(block.gradient)[:, None]))
    prefix = block.prefix * factors.to(block.prefix)[owners(block), None]
    return replace(block, prefix=change(prefix), suffix=change(block.suffix))


def _require_finite(name: str, block: Factored | Full, ids: np.ndarray) -> None:
    parts = (block.prefix, block.suffix) if isinstance(block, Factored) else (block.gradient,)
    if all(bool(torch.isfinite(part).all()) for part in parts):
        return
    raise NotFiniteError(
        f"The gradient of layer '{name}' is NaN or infinite for sample {ids[_first_broken(block)]}. Look for sqrt, "
        "log or division at zero in the model, at the learning rate, or for an overflow in half precision; what is "
        "larger than the store's type can hold needs dtype='float64'."
    )


def _first_broken(block: Factored | Full) -> int:
    if isinstance(block, Full):
        return int((~torch.isfinite(block.gradient)).any(dim=1).nonzero()[0])
    if not torch.isfinite(block.prefix).all():
        return int(owners(block)[(~torch.isfinite(block.prefix)).any(dim=1)][0])
    broken = (~torch.isfinite(block.suffix)).any(dim=1)
    return int(broken.nonzero()[0]) * block.samples // len(broken)


def has_same_form(layer: Layer, uses: Sequence[AlignedUse], given: set[str]) -> bool:
    """Whether this batch uses the layer in a way that its factors, as the store keeps them, express.

    ``given`` names the parameters whose gradients the uses give whole, or that took no part.
    """
    if layer.kind not in FACTORED_KINDS or layer.layout != FACTORED:
        return True
    weight, *bias = [parameter.name for parameter in layer.parameters]
    own = [use for use in uses if use.captured.weight == weight]
    same = {weight, *bias} <= given and all(
        use.captured.use.operation.kind in FACTORED_KINDS[layer.kind]
        and use.captured.use.groups == layer.groups
        and (not bias or use.captured.bias == bias[0])
        for use in own
    )
    stray_bias = any(use.captured.bias in bias for use in uses if use.captured.weight != weight)
    return same and not stray_bias and (layer.unfold is None or not own or geometry(own) == layer.unfold)


def require_same_form(layer: Layer, uses: Sequence[AlignedUse], given: set[str]) -> None:
    """Raises where ``has_same_form`` says no."""
    if not has_same_form(layer, uses, given):
        raise UnsupportedParameterError(
            f"Layer '{layer.name}' is used differently in this batch than in the first one (another operation, bias "
            "or image size, or a mixing of samples that its factors can't express). Record it from batches that use "
            "it alike, or leave it out with layers=."
        )


def _factored(layer: Layer, uses: Sequence[AlignedUse], samples: int, suffixes: Suffixes) -> Factored:
    """One part of a layer, from the uses of its weight that are of that kind."""
    own = [use for use in uses if use.captured.use.operation.kind == layer.kind]
    if not own:
        return _nothing(layer, samples)
    if layer.unfold is not None:
        return Factored(own[0].kept_input, own[0].prefix.detach().flatten(0, 1), samples)
    return factors(own, suffixes)


def _spelled_out(layer: Layer, gradients: Sequence[Tensor], samples: int) -> Block:
    """Whole gradients [n, *shape] of a layer's parameters as factors: a position for each column, or a table's row."""
    part, *others = parts(layer)
    assert part.input_width is not None
    assert part.output_width is not None
    weight, *bias = (each.detach().reshape(samples, *each.shape[1:]) for each in gradients)
    if part.kind == "embedding":
        rows = torch.arange(part.input_width, device=weight.device).repeat(samples)
        return Factored(rows, weight.flatten(0, 1), samples)
    prefix = weight.reshape(samples, part.output_width, part.input_width).transpose(1, 2)
    suffix = torch.eye(part.input_width, dtype=weight.dtype, device=weight.device).repeat(1, part.groups)
    if bias:
        # The bias is the sum of all prefixes: one more, of no column, makes up for the others.
        prefix = torch.cat([prefix, (bias[0] - prefix.sum(1)).unsqueeze(1)], dim=1)
        suffix = torch.cat([suffix, suffix.new_zeros(1, suffix.shape[1])])
    spelled = Factored(suffix.repeat(samples, 1), prefix.flatten(0, 1), samples)
    return whole([spelled, *(_nothing(other, samples) for other in others)])


def _nothing(layer: Layer, samples: int) -> Factored:
    """No position for any sample: the layer took no part in this batch."""
    assert layer.input_width is not None
    assert layer.output_width is not None
    prefix = torch.zeros(0, layer.output_width)
    offsets = torch.zeros(samples + 1, dtype=torch.int64)
    if layer.kind == "embedding":
        return Factored(torch.zeros(0, dtype=torch.int64), prefix, samples, offsets)
    return Factored(torch.zeros(0, layer.groups * layer.input_width), prefix, samples, offsets)


def _where_any(layer: Layer, gradient: Tensor | None, samples: int) -> Factored:
    """One position, the gradient as its prefix, for each sample that has any."""
    if gradient is None:
        return _nothing(layer, samples)
    busy = gradient.any(dim=1)
    offsets = torch.cat([busy.new_zeros(1, dtype=torch.int64), busy.cumsum(0)])
    prefix = gradient[busy]
    return Factored(prefix.new_ones(len(prefix), 1), prefix, samples, offsets)
