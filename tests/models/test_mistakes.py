"""What people get wrong at first: each has a sentence that says what to do."""

import pandas as pd
import polars as pl
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import metaql
from metaql import errors

INPUTS, CLASSES = torch.randn(12, 4), torch.arange(12) % 3


def network():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


class Rows:
    """A Dataset as other libraries have them, of whatever ``row(number)`` gives."""

    def __init__(self, row):
        self.row = row

    def __len__(self):
        return len(INPUTS)

    def __getitem__(self, number):
        return self.row(number)


def collect(path, data=None, losses=None, model=None):
    with metaql.Recorder(model or network(), path, losses=losses) as recorder:
        recorder.checkpoint()
        recorder.collect(TensorDataset(INPUTS, CLASSES) if data is None else data, "train")


@pytest.mark.parametrize(
    "losses, message",
    [
        (nn.CrossEntropyLoss(), "losses=CrossEntropyLoss is a function of a model's output and targets"),
        (F.cross_entropy, r"losses is called with \(model, batch\), such as lambda"),
        ("cross_entropy", "which can't be called"),
        (lambda model, inputs, targets: None, "missing a required argument: 'targets'"),
        (lambda batch: None, "too many positional arguments"),
        (lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), "reduction='none'. A mean would hide"),
        (lambda model, batch: None, "return a tensor with one loss for each sample"),
        (
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none")[:5],
            "12 ids for a batch of 5",
        ),
    ],
)
def test_losses(losses, message, tmp_path):
    with pytest.raises(errors.RecordingError, match=message):
        collect(tmp_path / "store", losses=losses)
    # The store is free for the next attempt.
    collect(tmp_path / "store")


def texts(number):
    return {"text": "words", "label": int(CLASSES[number])}


DATA = {
    "a pandas table": (lambda: pd.DataFrame({"a": [1.0], "y": [0]}), "data is a DataFrame, a table of columns"),
    "a polars table": (lambda: pl.DataFrame({"a": [1.0], "y": [0]}), "data is a DataFrame, a table of columns"),
    "a dict": (lambda: {"input": INPUTS, "labels": CLASSES}, "data is a dict, a table of columns"),
    "a loader": (lambda: DataLoader(TensorDataset(INPUTS, CLASSES), 4), "ids must be integers.*whose indices become"),
    "a loader of dicts": (
        lambda: DataLoader(Rows(lambda number: {"input": INPUTS[number]}), 4),
        r"data yields dicts where pairs \(ids, batch\) are needed.*batch.pop\('id'\)",
    ),
    "a list of dicts": (lambda: [texts(number) for number in range(3)], "data yields dicts where pairs"),
    "a list of pairs": (lambda: list(zip(INPUTS, CLASSES, strict=True)), "ids must be integers"),
    "dicts without labels": (lambda: Rows(texts), "needs its classes under 'labels'.*it has 'text', 'label'"),
    "texts": (
        lambda: Rows(lambda number: ("words", 1)),
        "The model can't be run on this batch's inputs, a tuple of str",
    ),
    "several lengths": (
        lambda: Rows(lambda number: (torch.zeros(number + 1), 1)),
        "don't go into one batch: stack expects each tensor to be equal size.*Pad samples",
    ),
    "no target": (lambda: Rows(lambda number: (INPUTS[number], None)), "don't go into one batch"),
    "too few ids": (lambda: [(range(3), (INPUTS[:4], CLASSES[:4]))], "3 ids for a batch of 4 losses. Give one id"),
    "too many ids": (lambda: [(range(5), (INPUTS[:4], CLASSES[:4]))], "5 ids for a batch of 4 losses. Give one id"),
    "another width": (lambda: [(range(3), (INPUTS[:3, :2], CLASSES[:3]))], "a float32 tensor of shape .3, 2.: mat1"),
    "another type": (
        lambda: [(range(3), (INPUTS[:3].double(), CLASSES[:3]))],
        "mat1 and mat2 must have the same dtype",
    ),
    "classes that are not there": (lambda: [(range(3), (INPUTS[:3], CLASSES[:3] + 7))], "does not fit.*out of bounds"),
    "numpy": (lambda: [(range(3), (INPUTS[:3].numpy(), CLASSES[:3].numpy()))], "a tuple of ndarray, ndarray"),
    "nested": (
        lambda: [(range(2), (torch.nested.nested_tensor([INPUTS[:2], INPUTS[:3]], layout=torch.jagged), CLASSES[:2]))],
        "holds a nested .jagged. tensor.*to_padded_tensor",
    ),
}


@pytest.mark.filterwarnings("ignore:.*nested:UserWarning")
@pytest.mark.parametrize("name", DATA)
def test_data(name, tmp_path):
    data, message = DATA[name]
    with pytest.raises(errors.RecordingError, match=message):
        collect(tmp_path / "store", data())


@pytest.mark.parametrize(
    "model, message",
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Dropout()), r"Call model.eval\(\)"),
        (nn.Linear(4, 3, device="meta"), "'weight' is on the meta device"),
        (nn.Linear(4, 3).requires_grad_(False), "no trainable parameter"),
        (nn.LazyLinear(3), "has no shape yet"),
    ],
)
def test_models(model, message, tmp_path):
    with pytest.raises(errors.ModelStateError, match=message):
        collect(tmp_path / "store", model=model)


def test_a_users_own_error_is_the_users(tmp_path):
    def broken(number):
        raise LookupError("the disk is elsewhere")

    with pytest.raises(LookupError, match="the disk is elsewhere"):
        collect(tmp_path / "store", Rows(broken))


@pytest.mark.parametrize("optimizer", [None, "sgd"])
def test_steps_need_the_optimizer(optimizer, tmp_path):
    with (
        metaql.Recorder(network(), tmp_path / "store") as recorder,
        pytest.raises(errors.RecordingError, match=r"Pass the torch.optim.Optimizer that trains the model"),
        recorder.step(range(4), optimizer),
    ):
        raise AssertionError


def test_a_step_is_one_backward_pass(tmp_path):
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def twice():
        for _ in range(2):
            F.cross_entropy(model(INPUTS), CLASSES).backward()

    with (
        metaql.Recorder(model, tmp_path / "store") as recorder,
        pytest.raises(errors.ModelStateError, match=r"2 backward passes ran inside one recorder.step"),
        recorder.step(range(12), optimizer),
    ):
        twice()
