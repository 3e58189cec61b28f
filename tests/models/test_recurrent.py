"""Sequence models of torch's own: recurrent ones, encoders and bags of words."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.models.batches import CLASSES, WORDS, sentences
from tests.models.loop import assert_collected, assert_stepped


class Recurrent(nn.Module):
    """Words, a recurrent network of two layers in both directions, and classes."""

    def __init__(self, kind, way):
        super().__init__()
        self.way = way
        self.words, self.head = nn.Embedding(WORDS, 4), nn.Linear(6, CLASSES)
        self.cells = kind(4, 3, 2, bidirectional=True, batch_first=way != "time first")

    def forward(self, x):
        words = self.words(x)
        if self.way == "packed":
            lengths = (x != 0).sum(1)
            packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
            return self.head(pad_packed_sequence(self.cells(packed)[0], batch_first=True)[0].sum(1))
        if self.way == "time first":
            return self.head(self.cells(words.transpose(0, 1))[0].mean(0))
        return self.head(self.cells(words)[0].mean(1))


class Cells(nn.Module):
    """One step of time after another."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(WORDS, 4), nn.Linear(3, CLASSES)
        self.first, self.second = nn.LSTMCell(4, 3), nn.GRUCell(3, 3)

    def forward(self, x):
        state, hidden = None, None
        for words in self.words(x).unbind(1):
            state = self.first(words, state)
            hidden = self.second(state[0], hidden)
        return self.head(hidden)


class Encoder(nn.Module):
    """nn.TransformerEncoder with padding, and positions that are a parameter."""

    def __init__(self, batch_first, norm_first):
        super().__init__()
        self.batch_first = batch_first
        self.words, self.head = nn.Embedding(WORDS, 8, padding_idx=0), nn.Linear(8, CLASSES)
        self.positions = nn.Parameter(torch.randn(6, 8) if batch_first else torch.randn(6, 1, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, norm_first=norm_first)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        words = self.words(x if self.batch_first else x.t())
        positions = self.positions[: x.shape[1]]
        hidden = self.body(words + positions, src_key_padding_mask=x == 0)
        return self.head(hidden.mean(1 if self.batch_first else 0))


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.words, self.head = nn.EmbeddingBag(WORDS, 4, mode=mode, padding_idx=0), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.words(x))


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
@pytest.mark.parametrize("way", ["samples first", "time first", "packed"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent(kind, way, tmp_path):
    assert_collected(Recurrent(kind, way).double(), sentences(), tmp_path / "store")


MODELS = {
    "cells": Cells,
    "encoder": lambda: Encoder(True, False),
    "encoder, norms first": lambda: Encoder(True, True),
    "encoder, time first": lambda: Encoder(False, False),
    "mean of words": lambda: Bag("mean"),
    "sum of words": lambda: Bag("sum"),
    "largest of words": lambda: Bag("max"),
}


@pytest.mark.parametrize("name", MODELS)
def test_of_words(name, tmp_path):
    model = MODELS[name]().double()
    assert_collected(model, sentences(), tmp_path / "store")
    if name not in ("cells", "largest of words"):
        assert_stepped(model, sentences(), tmp_path / "steps", train=False)
