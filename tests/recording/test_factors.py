"""The factors that are kept of a table: one position for each row that a sample looked up."""

import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import metaql
from metaql.storage.blocks import Factored, lay_out, merge_rows
from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.recorder import Recorder
from metaql.storage.recording.sample_gradients import SampleGradients
from metaql.storage.replay import Replay
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.storage.store import Store
from tests.recording.reference import assert_close, by_loop, gradients_of_rows, split_by_parameter

WORDS, WIDTH, CLASSES, LENGTH = 50, 4, 3, 8


def table(rows, width):
    return Layer("table", "embedding", (Parameter("table.weight", (rows, width)),), FACTORED, "float64", 1, rows, width)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(samples=st.integers(1, 5), length=st.integers(0, 7), rows=st.integers(1, 9), seed=st.integers(0, 999))
def test_merged_rows_are_the_same_gradient(samples, length, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    suffix = torch.randint(0, rows, (samples * length,), generator=generator)
    block = Factored(suffix, torch.randn(samples * length, 3, generator=generator, dtype=torch.float64), samples)
    merged, layer = merge_rows(block), table(rows, 3)
    torch.testing.assert_close(lay_out(layer, merged), lay_out(layer, block), rtol=1e-12, atol=1e-12)
    distinct = sum(len(set(one.tolist())) for one in suffix.reshape(samples, length))
    assert len(merged.suffix) == (distinct if distinct <= 0.9 * samples * length else samples * length)


class Reader(nn.Module):
    """Words, the kind of each word, and where it stands."""

    def __init__(self):
        super().__init__()
        self.words, self.kinds = nn.Embedding(WORDS, WIDTH), nn.Embedding(2, WIDTH)
        self.places, self.head = nn.Embedding(LENGTH, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, words):
        places = torch.arange(words.shape[1]).expand_as(words)
        states = torch.tanh(self.words(words) + self.kinds(torch.zeros_like(words)) + self.places(places))
        return self.head(states.mean(1))


@pytest.fixture
def sentences():
    words = torch.randint(1, WORDS, (6, LENGTH))
    words[:, 1] = words[:, 5] = 3
    words[2] = 7
    return words, torch.randint(0, CLASSES, (6,))


def test_what_is_looked_up_twice_is_kept_once(assert_exact, sentences):
    model = Reader().double()
    layers = assert_exact(model, sentences, 6)
    source = SampleGradients(ModelLosses(model, None), dict(model.named_parameters()), "float64")
    blocks = source.of(sentences, np.arange(6)).blocks
    assert blocks["words"].offsets.diff().tolist() == [len(set(one.tolist())) for one in sentences[0]]
    assert (blocks["kinds"].offsets, blocks["kinds"].suffix.tolist()) == (None, [0] * 6)
    assert {name: layers[name].positions for name in ("words", "kinds", "places")} == {
        "words": -(-len(blocks["words"].suffix) // 6),
        "kinds": 1,
        "places": LENGTH,
    }


def test_the_layout_counts_what_is_kept(assert_exact, sentences):
    layers = assert_exact(Reader().double(), sentences, 6)
    # Eight positions of five numbers are more than the whole table; the one that is left is less.
    assert layers["kinds"].layout == "factored"
    assert layers["places"].layout == "full"


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_merged_rows_come_back_from_a_store(dtype, tmp_path, sentences):
    model = Reader().double()
    with Recorder(model, tmp_path, dtype=dtype) as recorder:
        recorder.checkpoint()
        # A batch with words that come twice, and one without any.
        words = torch.stack([sentences[0][0], sentences[0][2], torch.arange(LENGTH), torch.arange(LENGTH) + 9])
        targets = sentences[1][:4]
        recorder.collect([(np.arange(2), (words[:2], targets[:2])), (np.arange(2, 4), (words[2:], targets[2:]))], "t")
    found = gradients_of_rows(Store.open(tmp_path), np.array([3, 0, 2, 1]))
    expected = {name: each[[3, 0, 2, 1]] for name, each in by_loop(model, (words, targets), 4).items()}
    tolerance = {"float32": 1e-6, "float64": 1e-9, "bfloat16": 2e-2}[dtype]
    assert_close(found, expected, tolerance)


class Tied(nn.Module):
    """A language model whose table is the output projection, with a bias there as BERT has it."""

    def __init__(self):
        super().__init__()
        self.words, self.inner = nn.Embedding(WORDS, 9), nn.Linear(9, 9)
        self.bias = nn.Parameter(torch.randn(WORDS))

    def forward(self, words):
        states = torch.tanh(self.inner(self.words(words)))
        return nn.functional.linear(states, self.words.weight, self.bias)


def word_losses(model, batch):
    """Cross entropy over the positions whose target is a word; 0 for a sentence without any."""
    words, targets = batch
    losses = nn.functional.cross_entropy(model(words).transpose(1, 2), targets, reduction="none", ignore_index=-1)
    return losses.sum(1)


@pytest.fixture
def masked(sentences):
    words = sentences[0]
    targets = torch.full_like(words, -1)
    targets[:, 2], targets[3, 6] = words[:, 3], 5
    # Nothing to learn from this sentence.
    targets[4] = -1
    return words, targets


def test_a_tied_weight_is_kept_in_factors(assert_exact, masked):
    model = Tied().double()
    layers = assert_exact(model, masked, 6, losses=word_losses)
    layer = layers["words"]
    assert (layer.kind, layer.layout, layer.input_width, layer.output_width) == ("tied", "factored", 9, WORDS)
    assert layers["bias"].kind == "bias"
    block = SampleGradients(ModelLosses(model, word_losses), dict(model.named_parameters()), "float64")
    found = block.of(masked, np.arange(6)).blocks["words"]
    assert found.table.offsets.diff().tolist() == [len(set(one.tolist())) for one in masked[0]]


def test_a_tied_weight_is_laid_out_where_that_is_smaller(assert_exact, sentences):
    words = sentences[0]
    layers = assert_exact(Tied().double(), (words, words.roll(1, 1)), 6, losses=word_losses)
    assert (layers["words"].kind, layers["words"].layout) == ("tied", "full")


class TiedTwice(Tied):
    """The weight as a projection at two depths, and as a table for two inputs."""

    def forward(self, words):
        first = torch.tanh(self.words(words) + self.words(words.roll(1, 1)))
        logits = nn.functional.linear(first, self.words.weight)
        second = torch.tanh(self.inner(first))
        return logits + nn.functional.linear(second, self.words.weight, self.bias)


def test_a_tied_weight_in_many_places(assert_exact, masked):
    layers = assert_exact(TiedTwice().double(), masked, 6, losses=word_losses)
    assert (layers["words"].kind, layers["words"].positions) == ("tied", 2 * LENGTH)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_a_tied_weight_comes_back_from_a_store(dtype, tmp_path, masked):
    model, rows = Tied().double(), np.array([5, 0, 4, 3, 9, 7])
    words, targets = masked
    with Recorder(model, tmp_path, losses=word_losses, dtype=dtype) as recorder:
        recorder.checkpoint()
        recorder.collect([(np.arange(4), (words[:4], targets[:4])), (np.arange(4, 6), (words[4:], targets[4:]))], "a")
        recorder.collect([(np.arange(6), (words.flip(0), targets.flip(0)))], "b")
    expected = by_loop(
        model, (torch.cat([words, words.flip(0)]), torch.cat([targets, targets.flip(0)])), 12, word_losses
    )
    found = gradients_of_rows(Store.open(tmp_path), rows)
    tolerance = {"float32": 1e-6, "float64": 1e-9, "bfloat16": 2e-2}[dtype]
    assert_close(found, {name: each[rows] for name, each in expected.items()}, tolerance)


def test_a_tied_weight_along_a_trajectory(tmp_path, masked):
    model = Tied().double()
    words, targets = masked
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    with Recorder(model, tmp_path, losses=word_losses, dtype="float64") as recorder:
        for _ in range(2):
            with recorder.step(np.arange(6), optimizer, reduction="sum"):
                word_losses(model, masked).sum().backward()
    expected = by_loop(model, (words, targets), 6, word_losses)
    assert_close(gradients_of_rows(Store.open(tmp_path), np.arange(6, 12)), expected, 1e-9)


def test_a_tied_weight_in_sql(tmp_path, masked):
    """Planned, as written pair by pair, by parameter and restored, against plain numbers."""
    model = Tied().double()
    words, targets = masked
    with Recorder(model, tmp_path, losses=word_losses, dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect([(np.arange(6), (words, targets))], "train")
        recorder.collect([(np.arange(4), (words[2:], targets[2:]))], "validation")
    expected = by_loop(model, masked, 6, word_losses)
    whole = torch.cat(list(expected.values()), 1)
    table = expected["words.weight"]
    score = "SELECT t.sample_id, avg(inner_product({}, {})) FROM train t, validation v GROUP BY ALL ORDER BY 1"
    with metaql.connect(tmp_path) as connection:
        planned = score.format("t.gradient", "v.gradient")
        restricted = score.format("layers(t.gradient, 'words')", "v.gradient")
        for gradients, query in ((whole, planned), (table, restricted)):
            means = (gradients @ gradients[2:].T).mean(1)
            assert [one for _, one in connection.sql(query).fetchall()] == pytest.approx(means.tolist(), rel=1e-9)
            assert connection._executor is not None
            plain = connection._executor.run(query, None, sys._getframe()).fetchall()
            assert [one for _, one in plain] == pytest.approx(means.tolist(), rel=1e-9)
        cosine = "SELECT norm(gradient), cosine_similarity(gradient, gradient) FROM train WHERE sample_id = 3"
        assert connection.sql(cosine).fetchall()[0] == pytest.approx((float(whole[3].norm()), 1.0))
        ((restored,),) = connection.sql("SELECT restore(avg(gradient), 'words') FROM train").fetchall()
        assert restored == pytest.approx(table.mean(0).tolist(), abs=1e-12)
        explained = connection.sql("EXPLAIN (VERBOSE) " + planned).fetchall()
        assert any("words" in str(line) for line in explained)
        ((factored,),) = connection.sql("SELECT factored_bytes FROM layers WHERE layer = 'words'").fetchall()
        assert factored < table.shape[1] * 8


def test_an_estimate_counts_both_parts_of_a_tied_weight(tmp_path, masked):
    data = [(np.arange(6), masked)]
    with Recorder(Tied().double(), tmp_path, losses=word_losses, dtype="float64") as recorder:
        estimate = recorder.estimate(data)
        recorder.checkpoint()
        recorder.collect(data, "train")
    segments = [one for each in Store.open(tmp_path).manifest.collections for one in each.segments]
    files = [one.file.bytes for one in segments if one.layer in ("words", "words (table)")]
    (words,) = [one for one in estimate.layers if one.layer == "words"]
    assert len(files) == 2
    assert words.bytes == sum(files)


def test_a_tied_weight_of_a_sample_that_was_not_recorded(tmp_path, masked):
    model = Tied().double()
    with Recorder(model, tmp_path, losses=word_losses, dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect([(np.arange(6), masked)], "train")
    store = Store.open(tmp_path)
    blocks = Replay(model, store, word_losses).gradient(masked[0][1:4], masked[1][1:4])
    expected = {name: each[1:4] for name, each in by_loop(model, masked, 6, word_losses).items()}
    assert_close(split_by_parameter(store.layers, blocks), expected, 1e-9)
