"""What layers record of an input that they have in common is stored once; their gradients are the loop's."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from metaql.storage.store import Store
from tests.recording.reference import assert_close, by_loop, gradients_of_rows

SAMPLES, LENGTH, WIDTH, CLASSES = 40, 4, 24, 3
AROUND = 1500


class Attention(nn.Module):
    """With fewer keys than queries, as with groups of queries."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)

    def forward(self, states):
        query, key, value = self.query(states), self.key(states), self.value(states)
        heads = [F.scaled_dot_product_attention(one, key, value) for one in query.chunk(2, -1)]
        return states + torch.cat(heads, -1)


class Gated(nn.Module):
    """The feed-forward part of a LLaMA."""

    def __init__(self):
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 16, bias=False), nn.Linear(WIDTH, 16, bias=False)
        self.down = nn.Linear(16, WIDTH, bias=False)

    def forward(self, states):
        return states + self.down(F.silu(self.gate(states)) * self.up(states))


class Texts(nn.Module):
    """Classifies by the first word, or the mean of all; ``layers`` may hold one more than once."""

    def __init__(self, layers, by_first=False):
        super().__init__()
        self.layers, self.by_first, self.head = nn.ModuleList(layers), by_first, nn.Linear(WIDTH, CLASSES)

    def forward(self, states):
        for layer in self.layers:
            states = layer(states)
        return self.head(states[:, 0] if self.by_first else states.mean(1))


def twice(layer):
    return [layer, layer]


MODELS = {
    "attention": lambda: Texts([Attention()]),
    "attention, by the first word": lambda: Texts([Attention(), Attention()], by_first=True),
    "gated": lambda: Texts([Gated()]),
    "attention used twice": lambda: Texts(twice(Attention())),
    "attention and gated, used twice": lambda: Texts(twice(nn.Sequential(Attention(), Gated()))),
}


@pytest.fixture
def texts():
    return torch.randn(SAMPLES, LENGTH, WIDTH, dtype=torch.float64), torch.randint(0, CLASSES, (SAMPLES,))


def collected(model, data, path, **options):
    with metaql.Recorder(model, path, **options) as recorder:
        recorder.checkpoint()
        recorder.collect(TensorDataset(*data), "train", batch_size=16)
    return Store.open(path)


def holders(store):
    """layer => the layer that has its suffixes."""
    found = {one.layer: one.suffix_of for each in store.manifest.collections for one in each.segments}
    return {name: holder for name, holder in found.items() if holder is not None}


@pytest.mark.parametrize("name", MODELS)
def test_collected(name, tmp_path, texts):
    model = MODELS[name]().double()
    store = collected(model, texts, tmp_path / "store", dtype="float64")
    assert_close(gradients_of_rows(store, np.arange(SAMPLES)), by_loop(model, texts, SAMPLES), 1e-9)
    rows = np.array([31, 2, 2, 17])
    expected = {parameter: each[rows] for parameter, each in by_loop(model, texts, SAMPLES).items()}
    assert_close(gradients_of_rows(store, rows), expected, 1e-9)
    shared = holders(store)
    if "gated" in name:
        assert [one for one in shared if one.endswith("up")]
    if name == "attention":
        assert shared == {"layers.0.key": "layers.0.query", "layers.0.value": "layers.0.query"}
    if name == "attention, by the first word":
        last = {"layers.1.value": "layers.1.key"}
        assert shared == {"layers.0.key": "layers.0.query", "layers.0.value": "layers.0.query"} | last


@pytest.mark.parametrize("name", MODELS)
def test_steps(name, tmp_path, texts):
    model = MODELS[name]().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for ids in torch.arange(SAMPLES).split(16):
            batch = texts[0][ids], texts[1][ids]
            expected.append(by_loop(model, batch, len(ids)))
            optimizer.zero_grad()
            with recorder.step(ids, optimizer):
                F.cross_entropy(model(batch[0]), batch[1]).backward()
            optimizer.step()
    store = Store.open(tmp_path / "store")
    whole = {parameter: torch.cat([one[parameter] for one in expected]) for parameter in expected[0]}
    assert_close(gradients_of_rows(store, np.arange(SAMPLES)), whole, 1e-9)
    assert holders(store)


def test_bytes(tmp_path, texts):
    """In place of 3 · (inputs + outputs)."""
    store = collected(Texts([Attention()]).double(), texts, tmp_path / "store", dtype="float64")
    numbers = {"layers.0.query": WIDTH + WIDTH, "layers.0.key": 12, "layers.0.value": 12}
    (collection,) = store.manifest.collections
    for one in collection.segments:
        if one.layer in numbers:
            assert 0 < one.file.bytes - 8 * SAMPLES * LENGTH * numbers[one.layer] < AROUND


def test_some_of_the_layers(tmp_path, texts):
    model = Texts([Attention()]).double()
    names = ["layers.0.key.*", "layers.0.value.*"]
    store = collected(model, texts, tmp_path / "store", dtype="float64", layers=names)
    assert holders(store) == {"layers.0.value": "layers.0.key"}
    with metaql.connect(tmp_path / "store") as connection:
        query = "SELECT sample_id, norm(layers(gradient, 'layers.0.value')) FROM train ORDER BY 1"
        found = [norm for _, norm in connection.sql(query).fetchall()]
    own = by_loop(model, texts, SAMPLES)
    expected = torch.cat([own["layers.0.value.weight"], own["layers.0.value.bias"]], 1).norm(dim=1)
    assert found == pytest.approx(expected.tolist(), rel=1e-9)


def test_rounded_by_autocast(tmp_path, texts):
    """Each layer rounds its input for itself."""
    model, data = Texts([Attention()]), (texts[0].float(), texts[1])

    def losses(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(batch[0])
        return F.cross_entropy(logits.float(), batch[1], reduction="none")

    store = collected(model, data, tmp_path / "store", losses=losses)
    assert holders(store) == {"layers.0.key": "layers.0.query", "layers.0.value": "layers.0.query"}
    assert_close(gradients_of_rows(store, np.arange(SAMPLES)), by_loop(model, data, SAMPLES, losses), 5e-2)


def test_an_input_that_is_changed_between_is_no_common_one(tmp_path, texts):
    class Changing(Texts):
        def forward(self, states):
            states = states.clone()
            first = self.layers[0](states.clone())
            states *= 2
            return self.head((first + self.layers[1](states)).mean(1))

    model = Changing([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)]).double()
    store = collected(model, texts, tmp_path / "store", dtype="float64")
    assert holders(store) == {}
    assert_close(gradients_of_rows(store, np.arange(SAMPLES)), by_loop(model, texts, SAMPLES), 1e-9)


def test_an_estimate_counts_it_once(tmp_path, texts):
    with metaql.Recorder(Texts([Attention()]).double(), tmp_path / "store", dtype="float64") as recorder:
        estimate = recorder.estimate(TensorDataset(*texts), batch_size=16)
        recorder.checkpoint()
        recorder.collect(TensorDataset(*texts), "train", batch_size=16)
        (collection,) = recorder._writer.manifest.collections
    assert estimate.bytes == pytest.approx(sum(file.bytes for file in collection.files), rel=0.05)
