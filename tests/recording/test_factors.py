"""The factors that are kept of a table: one position for each row that a sample looked up."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from metaql.storage.blocks import Factored, lay_out, merge_rows
from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.recorder import Recorder
from metaql.storage.recording.sample_gradients import SampleGradients
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.storage.store import Store
from tests.recording.reference import assert_close, by_loop, gradients_of_rows

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
