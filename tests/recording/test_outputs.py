"""Logits and embeddings are what the modules put out for each sample, by plain torch; or they are refused by name."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from metaql import errors
from metaql.storage import tables
from metaql.storage.store import Store

SAMPLES, WORDS, CLASSES = 15, 11, 3


def recorded(model, data, path, names, losses=None, batch_size=7, layers=None, **rest):
    """name => a list of each sample's output, in the order of ``data``, as tensors of their shapes."""
    with metaql.Recorder(model.eval(), path, losses=losses, layers=layers) as recorder:
        recorder.checkpoint()
        recorder.collect(data, "train", batch_size=batch_size, embeddings=names, **rest)
    store = Store.open(path)
    rows = np.arange(store.manifest.collections[0].rows)
    return {name: tensors_of(store.embeddings(name, rows), store.embeddings(name, rows, "shape")) for name in names}


def tensors_of(values, shapes):
    return [
        torch.tensor(value, dtype=torch.float32).reshape(shape)
        for value, shape in zip(values.to_pylist(), shapes.to_pylist(), strict=True)
    ]


def assert_equal(got, expected, **tolerance):
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other.detach().float(), **tolerance)


def sentences(length=6, samples=SAMPLES):
    return TensorDataset(torch.randint(0, WORDS, (samples, length)), torch.randint(0, CLASSES, (samples,)))


def test_logits(recorder, network, pictures, tmp_path):
    recorder.collect(TensorDataset(*pictures), "train", batch_size=16, logits=True)
    recorder.collect(TensorDataset(*pictures), "validation")
    store = Store.open(tmp_path / "store")
    got = store.logits(np.array([3, 39, 0, 45])).to_pylist()
    assert got[3] is None
    expected = network(pictures[0])[[3, 39, 0]].detach().float()
    torch.testing.assert_close(torch.tensor(got[:3]), expected, rtol=0, atol=1e-6)


def test_what_modules_put_out_before_it_is_changed_in_place(network, pictures, tmp_path):
    """The activation that follows the norm writes over its output."""
    data = TensorDataset(*pictures)
    got = recorded(network, data, tmp_path, ["conv", "norm", "head", ""], batch_size=16)
    maps = network.conv(pictures[0])
    assert_equal(got["conv"], maps, rtol=0, atol=1e-6)
    assert_equal(got["norm"], network.norm(maps), rtol=0, atol=1e-6)
    assert bool((torch.stack(got["norm"]) < 0).any())
    assert_equal(got["head"], network(pictures[0]), rtol=0, atol=1e-6)
    assert_equal(got[""], network(pictures[0]), rtol=0, atol=1e-6)


def test_gradients_are_the_same_with_and_without(network, pictures, tmp_path):
    stores = []
    for number, rest in enumerate(({}, {"logits": True, "embeddings": ["norm", "hidden"]})):
        with metaql.Recorder(network, tmp_path / str(number), dtype="float64") as recorder:
            recorder.checkpoint()
            recorder.collect(TensorDataset(*pictures), "train", batch_size=16, **rest)
        stores.append(Store.open(tmp_path / str(number)))
    for layer in stores[0].layers:
        one, other = (store.read(layer, np.arange(40)) for store in stores)
        assert all(
            torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one) if name in ("prefix", "gradient")
        )


class Recurrent(nn.Module):
    """Time first inside, in as many words as there are samples in a batch; the cells' output is a tuple."""

    def __init__(self):
        super().__init__()
        self.words, self.cells, self.head = nn.Embedding(WORDS, 5), nn.GRU(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.cells(self.words(x).transpose(0, 1))[0].mean(0))


def test_time_before_samples(tmp_path):
    """Batches of 7, 7 and 1 samples, of 7 words."""
    model, data = Recurrent(), sentences(7)
    got = recorded(model, data, tmp_path, ["words", "cells"])
    words = model.words(data.tensors[0])
    assert_equal(got["words"], words)
    assert_equal(got["cells"], model.cells(words.transpose(0, 1))[0].transpose(0, 1), rtol=1e-4, atol=1e-6)


class Flattened(nn.Module):
    """Positions and samples in one dimension, in either order."""

    def __init__(self, samples_first):
        super().__init__()
        self.samples_first = samples_first
        self.words, self.inner, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        words = self.words(x) if self.samples_first else self.words(x.T)
        inner = self.inner(words.flatten(0, 1)).tanh().unflatten(0, words.shape[:2])
        return self.head(inner.sum(1 if self.samples_first else 0))


@pytest.mark.parametrize("samples_first", [True, False])
def test_samples_and_positions_in_one_dimension(samples_first, tmp_path):
    model, data = Flattened(samples_first), sentences()
    got = recorded(model, data, tmp_path, ["inner"])
    assert_equal(got["inner"], model.inner(model.words(data.tensors[0])), rtol=1e-5, atol=1e-6)


def test_outputs_of_another_size_in_each_batch(tmp_path):
    model = Flattened(True)
    batches = [
        (torch.arange(first, first + 4), sentences(length, 4)[:]) for first, length in ((0, 6), (10, 3), (20, 9))
    ]
    got = recorded(model, batches, tmp_path, ["words", "head"])
    expected = [one for _, (x, _) in batches for one in model.words(x)]
    assert [tuple(one.shape) for one in got["words"]] == [(6, 5)] * 4 + [(3, 5)] * 4 + [(9, 5)] * 4
    assert_equal(got["words"], expected)


class Trimming(nn.Module):
    """As long as the longest sentence of the batch: alone, a sample is shorter."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        kept = (x != 0)[..., None]
        x = x[:, : int(kept.any(0).sum())]
        return self.head((self.inner(self.words(x)) * kept[:, : x.shape[1]]).sum(1))


def test_samples_that_are_shorter_alone(tmp_path):
    model, (words, targets) = Trimming(), sentences(8).tensors
    words[words == 0] = 1
    words[torch.arange(8) >= (torch.arange(SAMPLES)[:, None] % 5 + 2)] = 0
    got = recorded(model, TensorDataset(words, targets), tmp_path, ["inner"])
    # Batches of 7 and 7 with a sample of six words in each, and a last one of one sample, as long as it is.
    expected = model.inner(model.words(words))
    assert_equal(got["inner"], [*expected[:14, :6], expected[14, :6]], rtol=1e-5, atol=1e-6)


class Output(OrderedDict):
    """What Hugging Face's models return: the loss first, where there is one, and the states by name."""


@dataclass
class Pair:
    """What other libraries return."""

    number: int
    states: torch.Tensor


class Library(nn.Module):
    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 5), nn.Linear(5, CLASSES)
        self.wrapped, self.paired, self.nested = (Returning(kind) for kind in ("wrapped", "paired", "nested"))

    def forward(self, input_ids):
        states = self.nested(self.paired(self.wrapped(self.words(input_ids))["last_hidden_state"]).states)[0][1]
        return Output(loss=states.sum(), logits=self.head(states.mean(1)))


class Returning(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def forward(self, states):
        wrapped = Output(pooled=states.sum(1), last_hidden_state=states)
        return {"wrapped": wrapped, "paired": Pair(3, states), "nested": ((None, states), states.sum())}[self.kind]


def test_outputs_of_every_kind(tmp_path):
    model, (words, targets) = Library(), sentences().tensors
    batches = [(ids, {"input_ids": words[ids], "labels": targets[ids]}) for ids in torch.arange(SAMPLES).split(6)]
    got = recorded(model, batches, tmp_path, ["wrapped", "paired", "nested", ""], logits=True)
    for name in ("wrapped", "paired", "nested"):
        assert_equal(got[name], model.words(words))
    assert_equal(got[""], model(words)["logits"], rtol=1e-5, atol=1e-6)


def test_own_losses_show_no_logits_but_modules_do(network, pictures, tmp_path):
    def losses(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none").square()

    got = recorded(network, TensorDataset(*pictures), tmp_path / "store", [""], losses)
    assert_equal(got[""], network(pictures[0]), rtol=0, atol=1e-6)
    with (
        metaql.Recorder(network, tmp_path / "store", losses=losses) as recorder,
        pytest.raises(errors.RecordingError, match=r"losses= do not show any.*embeddings=\['classifier'\]"),
    ):
        recorder.collect(TensorDataset(*pictures), "train", logits=True)


def test_bfloat16_keeps_embeddings_in_float32(pictures, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3))
    with metaql.Recorder(model, tmp_path, dtype="bfloat16") as recorder:
        recorder.checkpoint()
        recorder.collect(TensorDataset(pictures[0].float(), pictures[1]), "train", embeddings=["2"], logits=True)
    store = Store.open(tmp_path)
    expected = model[:3](pictures[0].float())
    assert_equal([torch.tensor(one) for one in store.embeddings("2", np.arange(40)).to_pylist()], expected)


@pytest.mark.filterwarnings("ignore:Recorded by running")
def test_along_a_trajectory_there_are_none(recorder, network, pictures, tmp_path):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    recorder.collect(TensorDataset(*pictures), "train", embeddings=["head"])
    with recorder.step(range(40), optimizer):
        F.cross_entropy(network(pictures[0]), pictures[1]).backward()
    recorder.checkpoint()
    store = Store.open(tmp_path / "store")
    assert store.embeddings("head", np.array([0, 40])).is_valid().to_pylist() == [True, False]
    assert tables.embeddings(store).to_pylist() == [{"collection": 1, "layer": "head"}]


# What is refused, and how the refusal reads.


class Odd(nn.Module):
    """Modules whose outputs are not what each sample has of its own; the losses look at none of these."""

    def __init__(self):
        super().__init__()
        self.inner, self.shared, self.unused = nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 4)
        self.mixed, self.moved, self.whole, self.numbers = nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity()
        self.nothing, self.head = nn.Identity(), nn.Linear(4, 3)

    def forward(self, x):
        h = self.shared(self.inner(x.flatten(1)))
        self.mixed(h - h.mean(0))
        self.moved(h[h[:, 0].argsort()])
        self.whole(torch.arange(6.0))
        self.numbers(h.argmax(1))
        self.nothing("text")
        return self.head(self.shared(h))


@pytest.mark.parametrize(
    "names, error, message",
    [
        ("inner", errors.RecordingError, r"embeddings is a list of names of modules, such as .*not 'inner'"),
        ([3], errors.RecordingError, "embeddings is a list of names"),
        (["iner"], errors.UnknownNameError, "no module 'iner'. Did you mean 'inner'. The modules are: '', 'inner', 's"),
        (["unused"], errors.RecordingError, "module 'unused' was not called when the model ran"),
        (["inner", "shared"], errors.RecordingError, "module 'shared' is called 2 times in a pass"),
        (["mixed"], errors.ModelStateError, r"output of module 'mixed', of shape \[8, 4\], is which of the 8 samples'"),
        (["moved"], errors.ModelStateError, "output of module 'moved'"),
        (["whole"], errors.ModelStateError, r"output of module 'whole', of shape \[6\]"),
        (["numbers"], errors.RecordingError, r"module 'numbers' puts out a torch.int64 tensor of shape \[8\]"),
        (["nothing"], errors.RecordingError, "module 'nothing' puts out a str"),
    ],
)
def test_what_can_not_be_kept_is_refused_by_name(names, error, message, pictures, tmp_path):
    with metaql.Recorder(Odd().double(), tmp_path) as recorder:
        recorder.checkpoint()
        with pytest.raises(error, match=message):
            recorder.collect(TensorDataset(*pictures), "train", batch_size=8, embeddings=names)
    assert Store.open(tmp_path).manifest.collections == ()


class Sorting(Odd):
    """Rows in the order of their values, which first happens to be the batch's own."""

    def forward(self, x):
        h = self.inner(x.flatten(1))
        order = x[:, 0, 0, 0].argsort()
        return self.head(self.moved(h[order])[order.argsort()])


@pytest.mark.parametrize("frozen", [False, True])
def test_rows_that_move_by_what_is_in_them(frozen, pictures, tmp_path):
    ordered = pictures[0][pictures[0][:, 0, 0, 0].argsort()]
    model = Sorting().double()
    for parameter in model.inner.parameters():
        parameter.requires_grad_(not frozen)
    with metaql.Recorder(model, tmp_path, layers=["head"]) as recorder:
        recorder.checkpoint()
        with pytest.raises(errors.ModelStateError, match=r"output of module 'moved'.*in another order"):
            recorder.collect(TensorDataset(ordered, pictures[1]), "train", embeddings=["moved"])
        assert recorder.collect(TensorDataset(ordered, pictures[1]), "train", embeddings=["inner", "head"]) == 40


def test_logits_of_every_position_are_not_a_samples_own(tmp_path):
    model = nn.Sequential(nn.Conv1d(2, CLASSES, 3))
    data = TensorDataset(torch.randn(6, 2, 8), torch.randint(0, CLASSES, (6, 6)))
    with metaql.Recorder(model, tmp_path) as recorder:
        recorder.checkpoint()
        with pytest.raises(errors.BatchError, match=r"Keep its whole output: embeddings=\[''\]"):
            recorder.collect(data, "train", logits=True)
        recorder.collect(data, "train", embeddings=[""])
    assert_equal(tensors_of(*both(Store.open(tmp_path), "", 6)), model(data.tensors[0]), rtol=1e-5, atol=1e-6)


def both(store, name, rows):
    return store.embeddings(name, np.arange(rows)), store.embeddings(name, np.arange(rows), "shape")
