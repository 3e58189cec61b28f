"""The callback for Lightning: every gradient is that sample's own, and the training never notices."""

import copy
import random
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler

import metaql
from metaql import errors
from metaql.integrations.lightning import RecorderCallback
from tests.integrations.stores import assert_gradients, assert_same_weights, checkpoints, recorded

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '(train|val)_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec.* is deprecated:FutureWarning"),
]


class Points(Dataset):
    """Points in the plane and their quadrants; ``shaken`` by random numbers of its own or numpy's."""

    def __init__(self, count, seed=0, shaken=None):
        generator = torch.Generator().manual_seed(seed)
        self.points = torch.randn(count, 2, generator=generator)
        self.random = {"own": np.random.default_rng(3), "global": np.random, None: None}[shaken]

    def __len__(self):
        return len(self.points)

    def __getitem__(self, index):
        point = self.points[index]
        target = (point > 0).long() @ torch.tensor([1, 2])
        if self.random is not None:
            point = point + torch.from_numpy(self.random.normal(size=2)).float()
        return point, target


class Network(L.LightningModule):
    """Two layers with a dropout between them, a schedule, and batch norm on request."""

    def __init__(self, mixing=False):
        super().__init__()
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(8) if mixing else nn.Identity()
        self.layers = nn.Sequential(nn.Linear(2, 8), norm, nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 4))

    def forward(self, points):
        return self.layers(points)

    def training_step(self, batch, number):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, number, dataloader_idx=0):
        self.log("loss", F.cross_entropy(self(batch[0]), batch[1]))

    def on_train_epoch_end(self):
        # After the callbacks; Lightning leaves none where it validates.
        self.left = [each.grad.clone() for each in self.parameters() if each.grad is not None]

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


@pytest.fixture
def trained(tmp_path):
    """Trains a module for two epochs of four steps on the CPU, with shuffling; returns it."""

    def train(callbacks=(), module=None, train=None, valid=None, datamodule=None, **others):
        module = Network() if module is None else module
        L.seed_everything(1, verbose=False)
        usual = {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        if not any(isinstance(each, ModelCheckpoint) for each in callbacks):
            usual["enable_checkpointing"] = False
        trainer = L.Trainer(logger=False, default_root_dir=tmp_path, callbacks=list(callbacks), **{**usual, **others})
        if datamodule is None:
            train = loader(Points(14), shuffle=True) if train is None else train
            trainer.fit(module, train, valid)
        else:
            trainer.fit(module, datamodule=datamodule)
        return module

    return train


def loader(dataset, **others):
    return DataLoader(dataset, **{"batch_size": 4, **others})


def loss_on(dataset, dtype=torch.float32):
    """Cross entropy of one sample alone."""

    def loss(module, sample):
        point, target = dataset[sample]
        return F.cross_entropy(module(point[None].to(dtype)), target[None])

    return loss


@pytest.mark.parametrize(
    "module, others",
    [
        (Network, {}),
        (Network, {"accumulate_grad_batches": 3}),
        (lambda: Network(mixing=True), {}),
    ],
)
def test_each_sample_has_its_own_gradient(module, others, trained, tmp_path):
    train, valid = Points(14), Points(5, seed=1)
    callback = RecorderCallback(tmp_path / "store")
    model = trained([callback], module(), loader(train, shuffle=True), loader(valid), **others)
    got = recorded(tmp_path / "store")
    assert set(got) == {("train", 1), ("validation", 1)}
    assert_gradients(got["train", 1], loss_on(train), model, 14)
    assert_gradients(got["validation", 1], loss_on(valid), model, 5)


def test_double_precision(trained, tmp_path):
    train = Points(14)
    callback = RecorderCallback(tmp_path / "store", dtype="float64")
    model = trained([callback], train=loader(train, shuffle=True), precision="64-true")
    assert_gradients(recorded(tmp_path / "store")["train", 1], loss_on(train, torch.float64), model, 14, 1e-9)


def each_cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("losses", [None, each_cross_entropy])
def test_autocast_is_the_trainers(losses, trained, tmp_path):
    train = Points(14)
    callback = RecorderCallback(tmp_path / "store", losses)
    model = trained([callback], train=loader(train, shuffle=True), precision="bf16-mixed")

    def loss(module, sample):
        point, target = train[sample]
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(module(point[None]), target[None])

    # A batch and a sample alone are rounded alike, up to the order of sums.
    assert_gradients(recorded(tmp_path / "store")["train", 1], loss, model, 14, 1e-2)
    assert "forward" not in vars(model)


def test_losses_of_the_users_own(trained, tmp_path):
    class Bare(Network):
        forward = L.LightningModule.forward

        def training_step(self, batch, number):
            return F.mse_loss(self.layers(batch[0]).sum(1), batch[1].float())

    def losses(model, batch):
        return (model.layers(batch[0]).sum(1) - batch[1].float()).square()

    train = Points(14)
    callback = RecorderCallback(tmp_path / "store", losses=losses, layers="layers.4")
    model = trained([callback], Bare(), loader(train, shuffle=True))
    model.layers[0].requires_grad_(False)

    def loss(module, sample):
        point, target = train[sample]
        return losses(module, (point[None], target[None])).sum()

    assert_gradients(recorded(tmp_path / "store")["train", 1], loss, model, 14)
    with pytest.raises(errors.RecordingError, match="Bare has no forward"):
        trained([RecorderCallback(tmp_path / "other")], Bare())


class Doubling(L.LightningDataModule):
    """Hands points over at twice their size, and at three times while training."""

    def train_dataloader(self):
        return loader(Points(14), sampler=WeightedRandomSampler([1.0] * 14, 14))

    def val_dataloader(self):
        return {"near": loader(Points(5, seed=1)), "far": loader(Points(3, seed=2), batch_size=2)}

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0] * (3 if self.trainer.training else 2), batch[1]


def test_datamodules_and_their_hooks(trained, tmp_path):
    model = trained([RecorderCallback(tmp_path / "store")], datamodule=Doubling())
    got = recorded(tmp_path / "store")
    assert set(got) == {("train", 1), ("near", 1), ("far", 1)}
    for split, count, seed, factor in (("train", 14, 0, 3), ("near", 5, 1, 2), ("far", 3, 2, 2)):
        points = Points(count, seed)

        def loss(module, sample, points=points, factor=factor):
            point, target = points[sample]
            return F.cross_entropy(module(point[None] * factor), target[None])

        assert_gradients(got[split, 1], loss, model, count)


@pytest.mark.parametrize(
    "when, mixing, shaken",
    [("end", False, None), ("epoch", False, "own"), ("epoch", True, "global"), ("save", True, None)],
)
def test_the_training_does_not_notice(when, mixing, shaken, trained, tmp_path):
    models, draws = [], []
    for callbacks in ([], [RecorderCallback(tmp_path / "store", when=when)]):
        saving = [ModelCheckpoint(tmp_path / f"saved {len(models)}", every_n_epochs=1)] if when == "save" else []
        valid = loader(Points(5, seed=1)) if when == "save" else None
        data = loader(Points(14, shaken=shaken), shuffle=True), valid
        models.append(trained([*callbacks, *saving], Network(mixing), *data))
        draws.append((torch.rand(1), random.random(), np.random.rand()))
    assert draws[0] == draws[1]
    assert_same_weights(*models)
    assert {module.training for module in models[1].modules()} == {True}
    assert bool(models[1].left) == (when != "save")
    assert all(torch.equal(one, other) for one, other in zip(*(model.left for model in models), strict=True))


@pytest.mark.parametrize("shaken", ["own", "global"])
def test_what_is_random_is_the_same_each_time(shaken, trained, tmp_path):
    class Still(Network):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = loader(Points(14, shaken=shaken), shuffle=True)
    trained([RecorderCallback(tmp_path / "store", when="epoch")], Still(), data)
    got = recorded(tmp_path / "store")
    first, second = got["train", 1][1], got["train", 2][1]
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_several_epochs_and_validation_sets(trained, tmp_path):
    kept = []

    class Keeping(RecorderCallback):
        def on_train_epoch_end(self, trainer, pl_module):
            kept.append({name: value.clone() for name, value in pl_module.state_dict().items()})
            super().on_train_epoch_end(trainer, pl_module)

    near, far = Points(4, seed=1), Points(3, seed=2)
    model = trained([Keeping(tmp_path / "store", when="epoch")], valid=[loader(near), loader(far)])
    got = recorded(tmp_path / "store")
    assert set(got) == {(split, number) for split in ("train", "validation_0", "validation_1") for number in (1, 2)}
    for number in (1, 2):
        model.load_state_dict(kept[number - 1])
        for split, data in (("train", Points(14)), ("validation_0", near), ("validation_1", far)):
            assert_gradients(got[split, number], loss_on(data), model, len(data))
    rows = checkpoints(tmp_path / "store")
    # The rates of the epochs that these weights come from, not of the next ones.
    assert [(row["step"], row["epoch"], row["learning_rate"]) for row in rows] == [(4, 1, 0.1), (8, 2, 0.05)]
    assert rows[0]["momentum"] == 0.9


def test_saves_also_in_the_midst_of_validation(trained, tmp_path):
    saving = ModelCheckpoint(tmp_path / "saved", monitor="loss", every_n_epochs=1, save_top_k=-1, save_last=True)
    train, valid = Points(14), Points(5, seed=1)
    callback = RecorderCallback(tmp_path / "store", when="save")
    model = trained([callback, saving], train=loader(train, shuffle=True), valid=loader(valid), val_check_interval=2)
    steps = [row["step"] for row in checkpoints(tmp_path / "store")]
    assert steps == [2, 4, 6, 8]
    assert_gradients(recorded(tmp_path / "store")["train", 4], loss_on(train), model, 14)


def test_the_store_is_continued_or_begun_anew(trained, tmp_path):
    trained([RecorderCallback(tmp_path / "store")])
    trained([RecorderCallback(tmp_path / "store")], max_epochs=1)
    assert [row["step"] for row in checkpoints(tmp_path / "store")] == [8, 4]
    trained([RecorderCallback(tmp_path / "store", overwrite=True)])
    assert [row["step"] for row in checkpoints(tmp_path / "store")] == [8]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Points(12))


class Batches(Points):
    def __getitem__(self, index):
        return self.points, torch.zeros(len(self), dtype=torch.long)


def test_what_cannot_be_recorded_is_refused_before_training(trained, tmp_path):
    def refused(message, train=None, valid=None, **others):
        module = Network()
        before = copy.deepcopy(module)
        with pytest.raises(errors.RecordingError, match=message):
            trained([RecorderCallback(tmp_path / "store", **others)], module, train, valid)
        assert_same_weights(module, before)

    refused("split 'train' reads a Stream, a stream without length", loader(Stream()))
    refused("split 'validation' reads a Stream", valid=loader(Stream()))
    refused("has batch_size=None", loader(Batches(3), batch_size=None))
    refused("split 'train' is a list", [(Points(3).points, torch.zeros(3, dtype=torch.long))])
    refused("can't be called 'train'", valid={"train": loader(Points(3))})
    refused("no ModelCheckpoint", when="save")


@pytest.mark.parametrize("kind", [FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy])
def test_parameters_in_parts_are_refused_before_training(kind, tmp_path):
    """By the strategy's type; to make a trainer with one takes GPUs, or DeepSpeed."""
    trainer = SimpleNamespace(strategy=object.__new__(kind))
    with pytest.raises(errors.RecordingError, match=rf"{kind.__name__} keeps a part .* metaql.Recorder"):
        RecorderCallback(tmp_path / "store").on_train_start(trainer, Network())
    assert not (tmp_path / "store").exists()


def test_sql_finds_what_the_callback_recorded(trained, tmp_path):
    trained([RecorderCallback(tmp_path / "store")], valid=loader(Points(5, seed=1)))
    with metaql.connect(tmp_path / "store") as db:
        rows = db.sql("""
            SELECT t.sample_id, t.label, avg(inner_product(t.gradient, v.gradient)) AS influence
            FROM train t, validation v GROUP BY ALL ORDER BY ALL
        """).fetchall()
    got = recorded(tmp_path / "store")
    flat = {split: torch.cat(list(got[split, 1][1].values()), 1).double() for split in ("train", "validation")}
    assert [row[:2] for row in rows] == [(index, Points(14)[index][1].item()) for index in range(14)]
    expected = flat["train"] @ flat["validation"].mean(0)
    torch.testing.assert_close(torch.tensor([row[2] for row in rows]).double(), expected, rtol=1e-4, atol=1e-6)
