"""A model's recorded gradients, as a user gets them from the store, against autograd on one sample at a time."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import metaql
from metaql.storage import tables
from metaql.storage.store import Store
from tests.recording.reference import assert_close, gradients_of_rows, one_by_one


def cut(batch, place, samples):
    """The batch of the sample at this place alone."""
    if isinstance(batch, torch.Tensor):
        return batch[place : place + 1] if batch.dim() and len(batch) == samples else batch
    if isinstance(batch, Mapping):
        return {key: cut(value, place, samples) for key, value in batch.items()}
    return tuple(cut(value, place, samples) for value in batch)


def classified(model, batch):
    """Cross entropy of the model's logits, as the recorder takes it by default."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs), targets, reduction="none")


def by_loop(model, batch, samples, losses):
    """name => [samples, elements], each sample alone."""
    return one_by_one(model, samples, lambda place: losses(model, cut(batch, place, samples)).sum())


def numbered(batches):
    """(ids, batch) for each of [(samples, batch)]; ids go down, so that an order taken for granted is seen."""
    first = 1000
    for samples, batch in batches:
        first -= samples
        yield list(range(first + samples - 1, first - 1, -1)), batch


def _dtype(model):
    return "float64" if next(model.parameters()).dtype == torch.float64 else "float32"


def assert_collected(model, batches, path, losses=None, loop=None, tolerance=1e-9, layers=None):
    """Collects [(samples, batch)] and compares every parameter's gradient of every sample, and one product by SQL.

    Returns the store's layers by name. ``loop`` are the losses of the loop, where they are not ``losses``.
    """
    model.eval()
    with metaql.Recorder(model, path, losses=losses, dtype=_dtype(model), layers=layers) as recorder:
        recorder.checkpoint()
        recorder.collect(numbered(batches), "train")
    store = Store.open(path)
    rows = {each["sample_id"]: each["row"] for each in tables.gradients(store).to_pylist()}
    whole = []
    for (samples, batch), (ids, _) in zip(batches, numbered(batches), strict=True):
        got = gradients_of_rows(store, np.array([rows[each] for each in ids]))
        expected = by_loop(model, batch, samples, loop or losses or classified)
        assert_close(got, {name: expected[name] for name in got} if layers else expected, tolerance)
        whole += torch.cat([expected[name] for name in got], dim=1).double()
    _assert_product(path, whole[0], whole[-1], max(tolerance, 1e-5), rows)
    found = {layer.name: layer for layer in store.layers}
    store.close()
    return found


def _assert_product(path, first, last, tolerance, rows):
    with metaql.connect(path) as db:
        ((product,),) = db.sql(
            "SELECT inner_product(a.gradient, b.gradient) FROM train a, train b "
            f"WHERE a.sample_id = {max(rows)} AND b.sample_id = {min(rows)}"
        ).fetchall()
    assert product == pytest.approx(float(first @ last), abs=tolerance * float(first.norm() * last.norm()))


def assert_stepped(model, batches, path, losses=classified, tolerance=1e-9, layers=None, train=True):
    """Trains over [(samples, batch)] with SGD and compares each step's gradients with the loop at its weights."""
    model.train(train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    expected = []
    with metaql.Recorder(model, path, dtype=_dtype(model), layers=layers) as recorder:
        for ids, batch in numbered(batches):
            expected.append(by_loop(model, batch, len(ids), losses))
            optimizer.zero_grad()
            with recorder.step(ids, optimizer):
                losses(model, batch).mean().backward()
            optimizer.step()
    store = Store.open(path)
    table = tables.gradients(store)
    for number, gradients in enumerate(expected, start=1):
        rows = table.column("row").to_numpy()[table.column("step").to_numpy() == number]
        got = gradients_of_rows(store, rows)
        assert_close(got, {name: gradients[name] for name in got} if layers else gradients, tolerance)
    store.close()
