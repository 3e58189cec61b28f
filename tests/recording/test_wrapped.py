"""Models within DataParallel or torch.compile are recorded as the models they are; shards are refused."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from metaql import errors
from metaql.storage import tables
from metaql.storage.recording.wrappers import as_written, unwrapped
from metaql.storage.replay import Replay
from metaql.storage.store import Store
from tests.recording.reference import assert_close, by_loop, gradients_of_rows, split_by_parameter


def in_place(model):
    model.compile(backend="eager")
    return model


WRAPPERS = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled whole": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "compiled in place": in_place,
    "in parallel": nn.DataParallel,
    "compiled in parallel": lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_what_stands_around_a_model_is_taken_off(wrap, network, pictures, tmp_path):
    plain, model = copy.deepcopy(network), wrap(network)
    batch = pictures[0][:6], pictures[1][:6]
    F.cross_entropy(model(batch[0]), batch[1]).backward()  # Whatever is compiled, is compiled now.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        with recorder.step(np.arange(6), optimizer):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        recorder.checkpoint(optimizer)
        recorder.collect(TensorDataset(*pictures), "train")
    store = Store.open(tmp_path / "store")
    found = tables.gradients(store).to_pylist()
    for samples, step in ((6, 1), (40, None)):
        rows = np.array([each["row"] for each in found if each["step"] == step])
        expected = by_loop(plain, (pictures[0][:samples], pictures[1][:samples]), samples)
        assert_close(gradients_of_rows(store, rows), expected, 1e-9)
    assert store.manifest.model == type(network).__name__
    assert set(store.weights(1)) == set(plain.state_dict())
    blocks = Replay(model, store).gradient(*batch)
    assert_close(split_by_parameter(store.layers, blocks), by_loop(plain, batch, 6), 1e-9)


def test_a_compiled_training_step_is_told_where_the_recorder_belongs(network, pictures, tmp_path):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with metaql.Recorder(network, tmp_path / "store", dtype="float64") as recorder:

        @torch.compile(backend="eager")
        def train():
            with recorder.step(np.arange(6), optimizer):
                F.cross_entropy(network(pictures[0][:6]), pictures[1][:6]).backward()

        with pytest.raises(errors.RecordingError, match="outside of compiled functions"):
            train()


def test_what_is_compiled_stays_so_after_a_recording():
    before = torch._dynamo.eval_frame._stance.stance
    with as_written():
        assert torch._dynamo.eval_frame._stance.stance == "force_eager"
    assert torch._dynamo.eval_frame._stance.stance == before == "default"


def test_copies_on_several_devices_are_refused_in_a_step(network, tmp_path):
    model = nn.DataParallel(network)
    model.device_ids = [0, 1]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        with pytest.raises(errors.UnsupportedParameterError, match=r"DataParallel runs copies.*or record .* collect"):
            recorder.step([0], optimizer)
        assert recorder.checkpoint(optimizer) == 1


def test_wrappers_come_off_in_any_order(network):
    inner = nn.DataParallel(torch.compile(network, backend="eager"))
    assert unwrapped(torch.compile(inner, backend="eager")) is network
