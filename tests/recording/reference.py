"""The plain second implementation: a loop over samples through autograd, in the model's own precision."""

import copy

import torch

from metaql.storage.blocks import lay_out
from metaql.storage.recording.batches import take
from metaql.storage.recording.losses import ModelLosses


def one_by_one(model, samples, loss_of):
    """name => [samples, elements] of ``loss_of(k)``, the loss of sample k alone."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    rows = {name: [] for name in parameters}
    for sample in range(samples):
        model.zero_grad()
        loss_of(sample).backward()
        for name, parameter in parameters.items():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()
            rows[name].append(gradient.detach().flatten().clone())
    model.zero_grad()
    return {name: torch.stack(own) for name, own in rows.items()}


def by_loop(model, batch, samples, losses=None):
    """name => [samples, elements], each sample alone, by a copy of the model."""
    model = copy.deepcopy(model)
    function = ModelLosses(model, losses)
    return one_by_one(model, samples, lambda sample: function(take(batch, samples, [sample])).sum())


def split_by_parameter(layers, blocks):
    """name => [samples, elements] from the layers' blocks."""
    found = {}
    for layer in layers:
        values, begin = lay_out(layer, blocks[layer.name]), 0
        for parameter in layer.parameters:
            found[parameter.name] = values[:, begin : begin + parameter.width]
            begin += parameter.width
    return found


def assert_close(got, expected, tolerance):
    """Every sample's gradient of every parameter, relative to its own norm, beside noise of the whole gradient's."""
    assert set(got) == set(expected)
    whole = torch.stack([each.double().square().sum(1) for each in expected.values()]).sum(0).sqrt()
    for name, reference in expected.items():
        difference = (got[name].double() - reference.double()).norm(dim=1)
        allowed = tolerance * (reference.double().norm(dim=1) + 1e-3 * whole)
        assert bool((difference <= allowed).all()), (name, (difference / (allowed + 1e-300)).max().item())


def gradients_of_rows(store, rows):
    """name => [rows, elements], as a store has them."""
    return split_by_parameter(store.layers, {layer.name: store.read(layer, rows) for layer in store.layers})
