"""The recorder end to end: what stands in the store is what was promised, and what can't be is refused."""

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import metaql
from metaql import errors
from metaql.storage import tables
from metaql.storage.store import Store
from tests.recording.reference import assert_close, by_loop, gradients_of_rows


def rows_of(store, split):
    """sample id => row of the split, which was collected once."""
    table = tables.gradients(store).to_pylist()
    return {each["sample_id"]: each["row"] for each in table if each["split"] == split}


def assert_recorded(path, network, pictures, split="train", tolerance=1e-9):
    """The split's gradients are those of the samples that their ids name."""
    store = Store.open(path)
    rows = rows_of(store, split)
    inputs, targets = (each[list(rows)] for each in pictures)
    expected = by_loop(network, (inputs, targets), len(rows))
    assert_close(gradients_of_rows(store, np.array(list(rows.values()))), expected, tolerance)
    store.close()
    return list(rows)


def in_batches(pictures, order, size=16):
    return ((ids, (pictures[0][ids], pictures[1][ids])) for ids in torch.as_tensor(order).split(size))


def test_a_dataset_has_its_indices_as_ids(recorder, network, pictures, tmp_path):
    assert recorder.collect(TensorDataset(*pictures), "train", batch_size=16) == 40
    assert assert_recorded(tmp_path / "store", network, pictures) == list(range(40))


def test_ids_survive_shuffling(recorder, network, pictures, tmp_path):
    order = torch.randperm(40)
    recorder.collect(in_batches(pictures, order), "train")
    assert assert_recorded(tmp_path / "store", network, pictures) == order.tolist()


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, torch.as_tensor, lambda ids: np.asarray(ids, np.uint8)])
def test_ids_of_any_integer_kind(recorder, pictures, kind):
    assert recorder.collect([(kind([3, 1]), (pictures[0][:2], pictures[1][:2]))], "train") == 2


def test_bfloat16_halves_the_store(network, pictures, tmp_path):
    sizes = {}
    for dtype in ("float32", "bfloat16"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 64), nn.Tanh(), nn.Linear(64, 3))
        with metaql.Recorder(model, tmp_path / dtype, dtype=dtype) as recorder:
            recorder.checkpoint()
            recorder.collect(TensorDataset(pictures[0].float().repeat(25, 1, 1, 1), pictures[1].repeat(25)), "train")
        store = Store.open(tmp_path / dtype)
        sizes[dtype] = sum(tables.layers(store).column("stored_bytes").to_pylist())
        batch = (pictures[0].float(), pictures[1])
        assert_close(gradients_of_rows(store, np.arange(40)), by_loop(model, batch, 40), 2e-2)
    assert sizes["bfloat16"] < 0.52 * sizes["float32"]


@pytest.mark.parametrize("table", [pd.DataFrame, pl.DataFrame, pa.table, dict])
def test_metadata_from_any_table(recorder, pictures, tmp_path, table):
    names = table({"sample_id": list(range(39, -1, -1)), "writer": [f"w{each}" for each in range(39, -1, -1)]})
    recorder.collect(TensorDataset(*pictures), "train", metadata=names)
    samples = tables.samples(Store.open(tmp_path / "store")).to_pylist()
    assert samples[7] == {"sample_id": 7, "split": "train", "label": pictures[1][7].item(), "writer": "w7"}


def test_the_users_own_label_wins(recorder, pictures, tmp_path):
    recorder.collect(TensorDataset(*pictures), "train", metadata={"sample_id": range(40), "label": ["a"] * 40})
    assert tables.samples(Store.open(tmp_path / "store")).column("label")[0].as_py() == "a"


def test_outputs(recorder, network, pictures, tmp_path):
    recorder.collect(TensorDataset(*pictures), "train")
    outputs = tables.outputs(Store.open(tmp_path / "store"))
    logits = network(pictures[0]).detach()
    np.testing.assert_allclose(
        outputs.column("loss").to_numpy(), F.cross_entropy(logits, pictures[1], reduction="none").numpy(), rtol=1e-9
    )
    assert outputs.column("prediction").to_pylist() == logits.argmax(1).tolist()
    np.testing.assert_allclose(outputs.column("confidence").to_numpy(), logits.softmax(1).amax(1).numpy(), rtol=1e-5)


def test_own_losses_leave_predictions_unknown(network, pictures, tmp_path):
    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none").square()

    with metaql.Recorder(network, tmp_path / "store", losses=losses, dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect(TensorDataset(*pictures), "train")
    store = Store.open(tmp_path / "store")
    assert tables.outputs(store).column("prediction").null_count == 40
    assert_close(gradients_of_rows(store, np.arange(40)), by_loop(network, pictures, 40, losses), 1e-9)


def test_a_checkpoint_keeps_weights_and_settings(network, tmp_path):
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.8, 0.99))
    with metaql.Recorder(network, tmp_path / "store") as recorder:
        assert recorder.checkpoint(optimizer, epoch=3, note="first") == 1
        assert recorder.checkpoint() == 2
    store = Store.open(tmp_path / "store")
    first, second = tables.checkpoints(store).to_pylist()
    assert (first["epoch"], first["learning_rate"], first["betas"], first["note"]) == (3, 0.01, [0.8, 0.99], "first")
    assert second["learning_rate"] is None
    for name, value in network.state_dict().items():
        assert torch.equal(store.weights(1)[name], value)


def test_only_some_layers(network, pictures, tmp_path):
    with metaql.Recorder(network, tmp_path / "store", layers=["head", "*.bias"], dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect(TensorDataset(*pictures), "train")
    store = Store.open(tmp_path / "store")
    got = gradients_of_rows(store, np.arange(40))
    assert set(got) == {"conv.bias", "norm.bias", "hidden.bias", "head.weight", "head.bias"}
    whole = by_loop(network, pictures, 40)
    assert_close(got, {name: whole[name] for name in got}, 1e-9)


def test_inputs_are_kept_on_request(network, pictures, tmp_path):
    with metaql.Recorder(network, tmp_path / "store", inputs=True) as recorder:
        recorder.checkpoint()
        recorder.collect(in_batches(pictures, range(40)), "train")
    assert torch.equal(Store.open(tmp_path / "store").inputs(np.array([5, 2])), pictures[0][[5, 2]])


def test_a_buffer_may_be_filled_again_while_it_is_written(network, pictures, tmp_path):
    """Loaders that reuse one tensor for every batch."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()
    buffer = torch.empty(10, 1, 6, 6, dtype=torch.float64)

    def batches():
        for ids in torch.arange(40).split(10):
            yield ids, (buffer.copy_(pictures[0][ids]), pictures[1][ids])
        buffer.zero_()

    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect(batches(), "train")
    assert_recorded(tmp_path / "store", model, pictures)


def test_a_store_is_continued(network, pictures, tmp_path):
    for split in ("train", "validation"):
        with metaql.Recorder(network, tmp_path / "store", dtype="float64") as recorder:
            if split == "train":
                recorder.checkpoint()
            recorder.collect(TensorDataset(*pictures), split)
    assert_recorded(tmp_path / "store", network, pictures, "train")
    assert_recorded(tmp_path / "store", network, pictures, "validation")


def test_a_store_is_overwritten_on_request(network, tmp_path):
    for _ in range(2):
        with metaql.Recorder(network, tmp_path / "store", overwrite=True) as recorder:
            assert recorder.checkpoint() == 1


def test_the_model_is_left_as_it_was(recorder, network, pictures):
    network.head.weight.grad = torch.ones_like(network.head.weight)
    before = {name: each.clone() for name, each in network.state_dict().items()}
    with torch.no_grad():
        recorder.collect(TensorDataset(*pictures), "train")
    assert torch.equal(network.head.weight.grad, torch.ones_like(network.head.weight))
    assert network.conv.weight.grad is None
    assert all(torch.equal(before[name], each) for name, each in network.state_dict().items())
    assert all(each.requires_grad for each in network.parameters())


# What is refused, and how the refusal reads.


def test_collect_needs_a_checkpoint(network, pictures, tmp_path):
    with (
        metaql.Recorder(network, tmp_path / "store") as recorder,
        pytest.raises(errors.ModelStateError, match=r"Call recorder.checkpoint\(optimizer\) first"),
    ):
        recorder.collect(TensorDataset(*pictures), "train")


def test_collect_refuses_weights_that_moved(recorder, network, pictures):
    with torch.no_grad():
        network.head.bias.data += 1e-6
    with pytest.raises(errors.ModelStateError, match="The weights have moved since checkpoint 1"):
        recorder.collect(TensorDataset(*pictures), "train")


class DroppedByFunction(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(36, 3)

    def forward(self, x):
        return self.head(F.dropout(x.flatten(1), 0.5))


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3)), "'2' is in training mode: batch norm mixes"),
        (nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(36, 3)), "'1' is in training mode: dropout"),
        (DroppedByFunction(), "dropout or other randomness left on"),
    ],
)
def test_collect_refuses_gradients_that_are_not_the_samples_own(model, message, pictures, tmp_path):
    with metaql.Recorder(model.double(), tmp_path / "store") as recorder:
        recorder.checkpoint()
        with pytest.raises(errors.ModelStateError, match=message):
            recorder.collect(TensorDataset(*pictures), "train")


@pytest.mark.parametrize(
    "losses, error, message",
    [
        (lambda m, b: F.cross_entropy(m(b[0]), b[1]), errors.BatchError, "reduction='none'"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none") / len(b[1]), errors.ModelStateError, "divide"),
        (lambda m, b: F.cross_entropy(m(b[0]).detach(), b[1], reduction="none"), errors.BatchError, "do not depend"),
        (lambda m, b: 1.0, errors.BatchError, "losses returned a float"),
        (lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none").log().log(), errors.NotFiniteError, "sample"),
    ],
)
def test_losses_must_be_the_samples_own(losses, error, message, network, pictures, tmp_path):
    with metaql.Recorder(network, tmp_path / "store", losses=losses, dtype="float64") as recorder:
        recorder.checkpoint()
        with pytest.raises(error, match=message):
            recorder.collect(TensorDataset(*pictures), "train")
    assert Store.open(tmp_path / "store").manifest.collections == ()


def test_a_gradient_that_is_not_finite_names_its_sample(network, pictures, tmp_path):
    def losses(model, batch):
        return (model(batch[0]) - model(batch[0]).detach() * (batch[1] == 7)[:, None]).square().sum(1).sqrt()

    inputs, targets = pictures[0], pictures[1].clone()
    targets[30] = 7
    with metaql.Recorder(network, tmp_path / "store", losses=losses, dtype="float64") as recorder:
        recorder.checkpoint()
        with pytest.raises(errors.NotFiniteError, match="for sample 1030"):
            recorder.collect([(torch.arange(1000, 1040), (inputs, targets))], "train")


def test_a_gradient_that_the_stores_type_can_not_hold(network, pictures, tmp_path):
    """Finite in the model's float64, and infinity in float32."""

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * 10.0 ** (20.0 * batch[1].double())

    for dtype in ("float64", "float32", "bfloat16"):
        with metaql.Recorder(network, tmp_path / dtype, losses=losses, dtype=dtype) as recorder:
            recorder.checkpoint()
            if dtype == "float64":
                recorder.collect(TensorDataset(*pictures), "train")
                continue
            with pytest.raises(errors.NotFiniteError, match="needs dtype='float64'"):
                recorder.collect(TensorDataset(*pictures), "train")


@pytest.mark.parametrize(
    "data, message",
    [
        (lambda x, y: DataLoader(TensorDataset(x, y), 8), "ids"),
        (lambda x, y: [([1, 2, 3], (x[:4], y[:4]))], "4|3"),
        (lambda x, y: [([1, 1], (x[:2], y[:2]))], "Sample 1 of split 'train' comes twice"),
        (lambda x, y: [([1], (x[:1], y[:1])), ([1], (x[:1], y[:1]))], "Sample 1 of split 'train' comes twice"),
        (lambda x, y: [([0.5], (x[:1], y[:1]))], "must be integers"),
        (lambda x, y: [(["a"], (x[:1], y[:1]))], "must be integers"),
        (lambda x, y: [((x[:1], y[:1]))], "must be integers"),
        (lambda x, y: [([], (x[:0], y[:0]))], "A batch is empty|must be integers"),
        (lambda x, y: [], "holds no samples"),
        (lambda x, y: 3, "can't be iterated over"),
    ],
)
def test_ids_that_do_not_fit(data, message, recorder, pictures, tmp_path):
    with pytest.raises(errors.RecordingError, match=message):
        recorder.collect(data(*pictures), "train")
    assert Store.open(tmp_path / "store").manifest.collections == ()


def test_a_sample_is_recorded_once_at_a_checkpoint(recorder, pictures):
    recorder.collect(in_batches(pictures, range(20)), "train")
    recorder.collect(in_batches(pictures, range(20, 40)), "train")
    with pytest.raises(errors.SampleIdError, match="Sample 25 of split 'train' comes twice"):
        recorder.collect(in_batches(pictures, [25]), "train")
    recorder.checkpoint()
    recorder.collect(in_batches(pictures, [25]), "train")


@pytest.mark.parametrize(
    "metadata, message",
    [
        ({"id": [1]}, "has no column 'sample_id'"),
        ({"sample_id": [1, 1]}, "several rows for sample 1"),
        ({"sample_id": [1, None]}, "sample_id is NULL"),
        ({"sample_id": ["a"]}, "sample ids are integers"),
        ({"sample_id": [1], "loss": [2.0]}, "can't have a column 'loss'"),
        (3, "metadata is a int, which is not a table"),
    ],
)
def test_metadata_that_does_not_fit(metadata, message, recorder, pictures):
    with pytest.raises(errors.RecordingError, match=message):
        recorder.collect(TensorDataset(*pictures), "train", metadata=metadata)


def test_metadata_that_lacks_samples_warns(recorder, pictures):
    with pytest.warns(UserWarning, match="no row for 39 of 40 samples, such as 0"):
        recorder.collect(TensorDataset(*pictures), "train", metadata={"sample_id": [5], "writer": ["w"]})


def test_metadata_keeps_its_types(recorder, pictures):
    recorder.collect(TensorDataset(*pictures), "train", metadata={"sample_id": range(40), "age": range(40)})
    with pytest.raises(errors.BatchError, match="column 'age' is string, and int64"):
        recorder.collect(TensorDataset(*pictures), "test", metadata={"sample_id": range(40), "age": ["x"] * 40})


@pytest.mark.parametrize("split", ["", "  ", "Samples", 3, None])
def test_a_split_has_a_name_of_its_own(split, recorder, pictures):
    with pytest.raises(errors.RecordingError, match="split"):
        recorder.collect(TensorDataset(*pictures), split)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"dtype": "float16"}, errors.RecordingError, "dtype can be 'float32', 'float64', 'bfloat16'; not 'float16'"),
        ({"layers": "fc"}, errors.UnknownNameError, "no trainable parameter matches 'fc'. The parameters are: conv.w"),
    ],
)
def test_arguments_that_do_not_fit(arguments, error, message, network, tmp_path):
    with pytest.raises(error, match=message):
        metaql.Recorder(network, tmp_path / "store", **arguments)
    assert not (tmp_path / "store").exists()


def test_another_model_does_not_continue_a_store(recorder, network, pictures, tmp_path):
    recorder.collect(TensorDataset(*pictures), "train")
    recorder.close()
    with pytest.raises(errors.ModelStateError, match=r"parameter 'conv\.weight' is 4x1x3x3 there and missing here"):
        metaql.Recorder(nn.Linear(3, 3), tmp_path / "store", dtype="float64")
    with pytest.raises(errors.RecordingError, match="keeps float64, not float32"):
        metaql.Recorder(network, tmp_path / "store")


def test_an_interrupted_collection_leaves_nothing(recorder, pictures, tmp_path):
    def batches():
        yield from in_batches(pictures, range(30), 10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recorder.collect(batches(), "train")
    assert Store.open(tmp_path / "store").manifest.collections == ()
    assert recorder.collect(TensorDataset(*pictures), "train") == 40


def test_a_loss_that_compares_samples_is_refused(network, pictures, tmp_path):
    def paired(model, batch):
        """Samples 4 and 5 look at each other; the others at themselves alone."""
        logits = model(batch[0])
        losses = F.cross_entropy(logits, batch[1], reduction="none")
        partner = torch.zeros(len(losses), dtype=losses.dtype)
        if len(losses) > 5:
            partner[4] = (logits[4] - logits[5]).square().sum()
        return losses + partner

    with metaql.Recorder(network, tmp_path / "store", losses=paired, dtype="float64") as recorder:
        recorder.checkpoint()
        with pytest.raises(errors.ModelStateError, match="depends on other samples"):
            recorder.collect(TensorDataset(*pictures), "train")


def test_parameters_may_be_replaced_before_anything_is_recorded(network, pictures, tmp_path):
    with metaql.Recorder(network, tmp_path / "store", dtype="float64") as recorder:
        network.head = nn.Linear(8, 3).double()
        recorder.checkpoint()
        recorder.collect(TensorDataset(*pictures), "train")
        network.conv.requires_grad_(False)
        recorder.checkpoint()
        with pytest.raises(errors.ModelStateError, match=r"'conv.weight' is 4x1x3x3 there and missing here"):
            recorder.collect(TensorDataset(*pictures), "train")
        network.conv.requires_grad_(True)
    assert_recorded(tmp_path / "store", network, pictures)


def test_a_closed_recorder_records_nothing(recorder, pictures):
    recorder.close()
    for call in (recorder.checkpoint, lambda: recorder.collect(TensorDataset(*pictures), "train")):
        with pytest.raises(errors.RecordingError, match=r"is closed\. Make another one"):
            call()


def test_splits_that_sql_can_not_tell_apart(recorder, pictures):
    recorder.collect(TensorDataset(*pictures), "train")
    with pytest.raises(errors.RecordingError, match="SQL would not tell 'Train' from it"):
        recorder.collect(TensorDataset(*pictures), "Train")


def test_a_model_that_changes_while_it_is_recorded(pictures, tmp_path):
    model = nn.Sequential(nn.InstanceNorm2d(1, affine=True, track_running_stats=True), nn.Flatten(), nn.Linear(36, 3))
    with metaql.Recorder(model.double(), tmp_path / "store", dtype="float64") as recorder:
        recorder.checkpoint()
        with pytest.raises(errors.ModelStateError, match="no longer that of checkpoint 1"):
            recorder.collect(TensorDataset(*pictures), "train")


def test_a_complex_parameter_is_refused_by_name(tmp_path):
    model = nn.Linear(3, 3)
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(errors.UnsupportedParameterError, match="'phase' is complex"):
        metaql.Recorder(model, tmp_path / "store")
