"""What is in a store, for comparing with plain autograd."""

import numpy as np
import torch

from metaql.storage import tables
from metaql.storage.store import Store
from tests.recording.reference import assert_close, gradients_of_rows, one_by_one


def recorded(path):
    """(split, checkpoint) => (ids, name => [n, elements])."""
    store = Store.open(path)
    found = {}
    for row in tables.gradients(store).to_pylist():
        found.setdefault((row["split"], row["checkpoint"]), []).append((row["sample_id"], row["row"]))
    result = {}
    for key, pairs in found.items():
        ids, rows = zip(*pairs, strict=True)
        result[key] = list(ids), gradients_of_rows(store, np.array(rows))
    store.close()
    return result


def checkpoints(path):
    """The rows of the relation."""
    store = Store.open(path)
    try:
        return tables.checkpoints(store).to_pylist()
    finally:
        store.close()


def assert_gradients(got, loss_of, model, samples, tolerance=1e-4):
    """They are those of each sample alone, by plain autograd in eval mode; ids are all indices, in order."""
    ids, gradients = got
    assert ids == list(range(samples))
    model.eval()
    assert_close(gradients, one_by_one(model, samples, lambda sample: loss_of(model, sample)), tolerance)


def assert_same_weights(one, other):
    """Bit for bit."""
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    assert all(name == same and torch.equal(value, twin) for (name, value), (same, twin) in pairs)
