"""Which layers a model's parameters form, from the uses seen in a forward pass.

A weight and a bias that are only ever used together are one layer; any other parameter is one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import ceil

import torch

from metaql.storage.blocks import Factored
from metaql.storage.layout import choose
from metaql.storage.recording.aligned import AlignedUse
from metaql.storage.recording.factors import factors
from metaql.storage.schema import FACTORED, FULL, TIED, Layer, Parameter, Unfold

# What the uses of a layer may be, for the kinds that have factors.
FACTORED_KINDS = {"linear": ("linear",), "conv": ("conv",), "embedding": ("embedding",), TIED: ("linear", "embedding")}


def form_layers(
    parameters: Mapping[str, torch.nn.Parameter],
    uses: Sequence[AlignedUse],
    captured: set[str],
    unused: set[str],
    dtype: str,
) -> tuple[Layer, ...]:
    """The layers, in the order of the model's parameters.

    ``captured`` names the parameters whose gradients the uses give whole; ``unused`` those that no loss of
    this batch depends on, which cost nothing until one does.
    """
    shapes = {name: Parameter(name, tuple(parameter.shape)) for name, parameter in parameters.items()}
    uses = [use for use in uses if {use.captured.weight, use.captured.bias} & captured]
    biases = _joined_biases(uses, captured) | _paired_by_name(set(parameters) - captured - unused)
    layers = []
    for name, parameter in shapes.items():
        if name in biases.values():
            continue
        members = (parameter, shapes[biases[name]]) if name in biases else (parameter,)
        if name in unused:
            layers.append(_rarely_used(parameter, dtype))
        elif name in captured:
            layers.append(_captured_layer(members, uses, dtype))
        else:
            layers.append(Layer(_name(members), "parameter", members, FULL, dtype))
    return tuple(layers)


def _joined_biases(uses: Sequence[AlignedUse], captured: set[str]) -> dict[str, str]:
    """weight => bias for those that never appear without each other."""
    pairs = {(use.captured.weight, use.captured.bias) for use in uses}
    joined = {}
    for weight, bias in pairs:
        alone = [pair for pair in pairs if weight in pair or bias in pair] == [(weight, bias)]
        if weight in captured and bias in captured and alone:
            assert weight is not None
            assert bias is not None
            joined[weight] = bias
    return joined


def _paired_by_name(names: set[str]) -> dict[str, str]:
    """weight => bias by the names that torch's modules give them."""
    stems = {name.removesuffix("weight") for name in names if name.split(".")[-1] == "weight"}
    return {f"{stem}weight": f"{stem}bias" for stem in stems if f"{stem}bias" in names}


def _captured_layer(members: tuple[Parameter, ...], uses: Sequence[AlignedUse], dtype: str) -> Layer:
    name = members[0].name
    own = [use for use in uses if use.captured.weight == name]
    kinds = {(use.captured.use.operation.kind, use.captured.use.groups) for use in own}
    as_bias = any(use.captured.bias == name for use in uses)
    if not own:
        added = all(use.captured.use.operation.kind != "parameter" for use in uses if use.captured.bias == name)
        return Layer(_name(members), "bias" if added else "parameter", members, FULL, dtype)
    if kinds == {("linear", 1), ("embedding", 1)} and not as_bias:
        return _tied_layer(members, own, dtype)
    if as_bias or len(kinds) > 1 or own[0].captured.use.operation.kind not in FACTORED_KINDS:
        kind = "norm" if {kind for kind, _ in kinds} == {"norm"} and not as_bias else "parameter"
        return Layer(_name(members), kind, members, FULL, dtype)
    return _factored_layer(members, own, dtype)


def _factored_layer(members: tuple[Parameter, ...], own: Sequence[AlignedUse], dtype: str) -> Layer:
    shape = members[0].shape
    use = own[0].captured.use
    kind, groups = use.operation.kind, use.groups
    found = factors(own)
    if kind == "embedding":
        input_width, output_width = shape[0], shape[1]
    else:
        input_width, output_width = members[0].width // shape[0], shape[0]
    layer = Layer(_name(members), kind, members, FACTORED, dtype, groups, input_width, output_width, _positions(found))
    return choose(layer, _busy_positions(found), geometry(own))


def _tied_layer(members: tuple[Parameter, ...], own: Sequence[AlignedUse], dtype: str) -> Layer:
    rows, width = members[0].shape
    projection, table = (
        factors([use for use in own if use.captured.use.operation.kind == kind]) for kind in FACTORED_KINDS[TIED]
    )
    layer = Layer(_name(members), TIED, members, FACTORED, dtype, 1, width, rows, _positions(projection))
    return choose(replace(layer, looked_up=_positions(table)), _busy_positions(projection))


def _positions(found: Factored) -> int:
    """The positions of an average sample."""
    return ceil(len(found.prefix) / found.samples)


def _busy_positions(found: Factored) -> float:
    """How many positions of an average sample have a prefix other than zero; the others are not kept."""
    return int(found.prefix.any(dim=-1).sum()) / found.samples


def geometry(own: Sequence[AlignedUse]) -> Unfold | None:
    """How to unfold the stored input, where one convolution of whole samples is all there is."""
    use = own[0].captured.use
    return use.geometry if len(own) == 1 and own[0].captured.leading == (own[0].samples,) else None


def _rarely_used(parameter: Parameter, dtype: str) -> Layer:
    # One position, the gradient as its prefix, for the samples that have any, and none for the others.
    return Layer(parameter.name, "parameter", (parameter,), FACTORED, dtype, 1, 1, parameter.width, None)


def _name(members: tuple[Parameter, ...]) -> str:
    """The module's name for its weight; else the parameter's own."""
    name = members[0].name
    return name.removesuffix(".weight") if name.endswith(".weight") else name
