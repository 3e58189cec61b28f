"""Gradients of samples that were never recorded."""

import pytest
import torch
from torch.utils.data import TensorDataset

import metaql
from metaql import errors
from metaql.storage.replay import Replay
from metaql.storage.store import Store
from tests.recording.reference import assert_close, by_loop, split_by_parameter


@pytest.fixture
def store(recorder, pictures, tmp_path):
    recorder.collect(TensorDataset(*pictures), "train")
    opened = Store.open(tmp_path / "store")
    yield opened
    opened.close()


def test_a_new_sample_has_the_gradient_that_autograd_gives(store, network):
    batch = torch.randn(3, 1, 6, 6, dtype=torch.float64), torch.tensor([0, 2, 1])
    blocks = Replay(network, store).gradient(*batch)
    assert_close(split_by_parameter(store.layers, blocks), by_loop(network, batch, 3), 1e-9)


def test_it_is_that_of_the_checkpoint_wherever_the_model_has_gone_since(store, network):
    batch = torch.randn(1, 1, 6, 6, dtype=torch.float64), torch.tensor([0])
    expected = by_loop(network, batch, 1)
    network.train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert_close(split_by_parameter(store.layers, Replay(network, store).gradient(*batch)), expected, 1e-9)
    assert network.training
    assert not network.head.weight.any()


def test_sql_knows_the_shape_of_an_input(store, network, pictures, tmp_path):
    with metaql.connect(tmp_path / "store", model=network) as db:
        (product, square), *_ = db.sql(
            "SELECT inner_product(gradient($x, $y), gradient), norm(gradient) ** 2 FROM train WHERE sample_id = 7",
            {"x": pictures[0][7].flatten().tolist(), "y": int(pictures[1][7])},
        ).fetchall()
    assert product == pytest.approx(square, rel=1e-5)


def test_another_model_does_not_fit(store):
    with pytest.raises(errors.ModelStateError, match="does not fit the weights of checkpoint 1"):
        Replay(torch.nn.Linear(3, 3), store)


def test_losses_of_the_users_own_can_not_be_guessed(network, pictures, tmp_path):
    def squared(model, batch):
        return model(batch[0]).square().sum(1)

    with metaql.Recorder(network, tmp_path / "own", losses=squared) as recorder:
        recorder.checkpoint()
        recorder.collect(TensorDataset(*pictures), "train")
    with pytest.raises(errors.ModelStateError, match="'losses=squared'"):
        metaql.connect(tmp_path / "own", model=network)
    with pytest.raises(errors.RecordingError, match="'losses=squared', not of 'cross_entropy'"):
        metaql.Recorder(network, tmp_path / "own")


def test_a_store_without_a_checkpoint_can_not_be_replayed(network, tmp_path):
    metaql.Recorder(network, tmp_path / "empty").close()
    with pytest.raises(errors.ModelStateError, match="no recorded checkpoint"):
        Replay(network, Store.open(tmp_path / "empty"))
