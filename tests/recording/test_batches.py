"""What a batch may hold, and what is refused because it has no values, no samples, or two meanings."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metaql
from metaql import errors
from metaql.storage.store import Store
from tests.recording.reference import assert_close, by_loop, gradients_of_rows


@pytest.mark.parametrize("soft", [False, True])
def test_positions_as_many_as_classes_can_be_read_in_two_ways(soft, tmp_path):
    """Targets [n, S] fit logits [n, S, C] and [n, C, S] alike where S is C, and soft ones always do."""
    model = nn.Linear(6, 5).double()
    inputs = torch.randn(4, 3 if soft else 5, 6).double()
    targets = torch.randn(4, 3, 5).double().softmax(-1) if soft else torch.randint(0, 5, (4, 5))
    with metaql.Recorder(model, tmp_path / "store") as recorder:
        recorder.checkpoint()
        with pytest.raises(errors.BatchError, match=r"read in two ways: .*dimension 1, .*the last.* losses="):
            recorder.collect([(range(4), (inputs, targets))], "train")

    def classes_last(model, batch):
        targets = batch[1].movedim(-1, 1) if soft else batch[1]
        return F.cross_entropy(model(batch[0]).movedim(-1, 1), targets, reduction="none").flatten(1).mean(1)

    with metaql.Recorder(model, tmp_path / "store", losses=classes_last, dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect([(range(4), (inputs, targets))], "train")
    got = gradients_of_rows(Store.open(tmp_path / "store"), np.arange(4))
    assert_close(got, by_loop(model, (inputs, targets), 4, classes_last), 1e-9)


def test_positions_unlike_classes_are_read_as_torch_does(tmp_path):
    model = nn.Conv1d(6, 5, 1).double()
    inputs, targets = torch.randn(4, 6, 3).double(), torch.randint(0, 5, (4, 3))
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect([(range(4), (inputs, targets))], "train")
    expected = by_loop(model, (inputs, targets), 4, lambda m, b: F.cross_entropy(m(b[0]), b[1])[None])
    assert_close(gradients_of_rows(Store.open(tmp_path / "store"), np.arange(4)), expected, 1e-9)


def test_sparse_inputs_are_collected_but_not_kept(tmp_path):
    model = nn.Linear(6, 3).double()
    inputs, targets = torch.randn(4, 6).relu().double(), torch.randint(0, 3, (4,))
    sparse = inputs.to_sparse()
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        recorder.checkpoint()
        with pytest.warns(UserWarning, match=r"one by one.*layers=, or pass dense inputs"):
            recorder.collect([(range(4), (sparse, targets))], "train")
    assert_close(
        gradients_of_rows(Store.open(tmp_path / "store"), np.arange(4)), by_loop(model, (inputs, targets), 4), 1e-9
    )
    with metaql.Recorder(model, tmp_path / "other", inputs=True) as recorder:
        recorder.checkpoint()
        slow = pytest.warns(UserWarning, match="one by one")
        with slow, pytest.raises(errors.BatchError, match=r"these are sparse.*inputs=False"):
            recorder.collect([(range(4), (sparse, targets))], "train")


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x, y: (x.to_sparse_bsr((2, 2)), y),
            r"in blocks \(torch.sparse_bsr\), out of which samples can't be cut",
        ),
        (lambda x, y: (x, F.one_hot(y, 3).double().to_sparse()), "sparse targets.*to_dense"),
        (lambda x, y: (x.to("meta"), y), "on the meta device, where it has no values"),
        (lambda x, y: {"input": x, "labels": y.to("meta")}, "on the meta device, where it has no values"),
    ],
)
def test_tensors_that_hold_no_plain_values(change, message, tmp_path):
    batch = change(torch.randn(4, 6).double(), torch.randint(0, 3, (4,)))
    with metaql.Recorder(nn.Linear(6, 3).double(), tmp_path / "store") as recorder:
        recorder.checkpoint()
        for record in (lambda data: recorder.collect(data, "train"), recorder.estimate):
            with pytest.raises(errors.BatchError, match=message):
                record([(range(4), batch)])


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.running_mean"])
def test_a_model_without_values(name, tmp_path):
    """All of it on the meta device, or a frozen parameter or a buffer alone."""
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3).requires_grad_(False))
    module = model.get_submodule(name.split(".")[0])
    setattr(module, name.split(".")[1], getattr(copy.deepcopy(module).to("meta"), name.split(".")[1]))
    with pytest.raises(errors.ModelStateError, match=f"'{name}' is on the meta device"):
        metaql.Recorder(model, tmp_path / "store")
