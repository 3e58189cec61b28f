"""What an estimate foretells is what a recording then takes, and estimating leaves no trace."""

from __future__ import annotations

import ast
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import metaql
from metaql import errors
from metaql.storage.recording.sample_gradients import SampleGradients

SAMPLES = 600


class Sentences(nn.Module):
    """Words whose padding has no gradient, so that samples differ in positions; a table that is stored in factors."""

    def __init__(self):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(50, 16, padding_idx=0), nn.Linear(16, 24), nn.Linear(24, 3)

    def forward(self, x):
        kept = (x != 0)[..., None]
        return self.head((torch.relu(self.inner(self.words(x))) * kept).sum(1) / kept.sum(1))


def pictures():
    return TensorDataset(torch.randn(SAMPLES, 1, 6, 6), torch.randint(0, 3, (SAMPLES,)))


def sentences():
    words = torch.randint(1, 50, (SAMPLES, 12))
    words[torch.arange(12) >= torch.randint(2, 12, (SAMPLES, 1))] = 0
    return TensorDataset(words, torch.randint(0, 3, (SAMPLES,)))


def convolutional():
    # Many positions of the first layer are larger than its gradient, which is stored in full.
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 3)
    )


def files_of(path):
    return {each: each.read_bytes() for each in path.rglob("*") if each.is_file()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("model, data", [(convolutional, pictures), (Sentences, sentences)])
def test_bytes_on_disk(model, data, dtype, inputs, tmp_path):
    data = data()
    with metaql.Recorder(model(), tmp_path / "store", dtype=dtype, inputs=inputs) as recorder:
        estimate = recorder.estimate(data, batch_size=200)
        recorder.checkpoint()
        recorder.collect(data, "train", batch_size=200)
        (collection,) = recorder._writer.manifest.collections
    assert estimate.samples == SAMPLES
    assert estimate.bytes == pytest.approx(sum(file.bytes for file in collection.files), rel=0.03)
    assert {one.layer: one.bytes for one in estimate.layers} == {
        segment.layer: pytest.approx(segment.file.bytes, rel=0.05) for segment in collection.segments
    }
    assert {one.layout for one in estimate.layers} == {"factored", "full"} or data.tensors[0].dim() == 2
    forms = {segment.form for segment in collection.segments}
    assert forms == ({"differing", "fixed"} if model is Sentences else {"fixed", "full"})
    kept = collection.inputs.file.bytes if inputs else 0
    assert estimate.inputs_per_sample * SAMPLES == pytest.approx(kept, rel=0.02)


class TiedTable(Sentences):
    """The table is the last layer too: a position of the one kind for each word, and one of the other."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.words.weight


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_of_tied_weights(dtype, tmp_path):
    data = sentences()
    with metaql.Recorder(TiedTable(), tmp_path / "store", dtype=dtype) as recorder:
        estimate = recorder.estimate(data, batch_size=200)
        recorder.checkpoint()
        recorder.collect(data, "train", batch_size=200)
        (collection,) = recorder._writer.manifest.collections
    assert estimate.bytes == pytest.approx(sum(file.bytes for file in collection.files), rel=0.03)


def test_bytes_at_bfloat16(tmp_path):
    data, found = sentences(), {}
    for dtype in ("float32", "bfloat16"):
        with metaql.Recorder(Sentences(), tmp_path / dtype, dtype=dtype) as recorder:
            found[dtype] = recorder.estimate(data)
    assert found["float32"].bfloat16_bytes == pytest.approx(found["bfloat16"].bytes, rel=0.05)
    assert found["bfloat16"].bfloat16_bytes == found["bfloat16"].bytes
    assert "dtype='bfloat16' saves" in str(found["float32"])
    assert "dtype=" not in str(found["bfloat16"])


def test_shares_and_totals_add_up(recorder, pictures):
    estimate = recorder.estimate(TensorDataset(*pictures))
    beside = estimate.rows_per_sample / estimate.bytes_per_sample
    assert sum(one.share for one in estimate.layers) + beside == pytest.approx(1)
    per_sample = sum(one.bytes_per_sample for one in estimate.layers) + estimate.rows_per_sample
    assert per_sample == pytest.approx(estimate.bytes_per_sample)
    assert estimate.seconds_per_batch > 0
    assert estimate.seconds > estimate.seconds_per_batch
    assert estimate.memory > 0
    assert estimate.buffers == estimate.bytes
    assert estimate.fits


def test_it_reads_as_a_table(recorder, pictures):
    lines = str(recorder.estimate(TensorDataset(*pictures))).splitlines()
    assert lines[0].split() == ["layer", "kind", "layout", "positions", "a", "sample", "in", "all", "share"]
    assert [line.split()[0] for line in lines[1:6]] == ["conv", "norm", "hidden", "head", "ids,"]
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[7].startswith("40 samples take ")
    assert "(measured)" in lines[8]
    assert "(assumed)" in lines[8]


def test_a_model_of_many_layers_is_summed_up(tmp_path):
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(36, 36) for _ in range(40)))
    with metaql.Recorder(model, tmp_path / "store") as recorder:
        estimate = recorder.estimate(pictures())
    assert len(estimate.layers) == 40
    assert "16 smaller layers" in str(estimate)
    assert len(str(estimate).splitlines()) < 35


def test_what_is_suggested_saves_what_is_said(tmp_path):
    model, data = nn.Sequential(convolutional(), nn.Linear(3, 3)), pictures()
    with metaql.Recorder(model, tmp_path / "all") as recorder:
        whole = recorder.estimate(data)
    line = next(line for line in whole.suggestions if line.startswith("Leaving out"))
    layers = ast.literal_eval(line.partition("layers=")[2])
    assert layers == ["0.1", "0.4", "0.6", "1"] or layers == ["0.0", "0.1", "0.6", "1"]
    with metaql.Recorder(model, tmp_path / "some", layers=layers) as recorder:
        rest = recorder.estimate(data)
    assert {one.layer for one in whole.layers} - {one.layer for one in rest.layers} == {
        ast.literal_eval(line.split()[2])
    }
    saved = 1 - rest.bytes_per_sample / whole.bytes_per_sample
    assert f"saves {saved:.0%}".replace("%", " %") in line


def test_layers_that_were_left_out_stay_so_in_what_is_suggested(recorder, network, pictures, tmp_path):
    with metaql.Recorder(network, tmp_path / "some", layers=["hidden", "head.weight"]) as some:
        (first, *_) = some.estimate(TensorDataset(*pictures)).suggestions
    assert first.endswith("layers=['head.weight']")


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(np.arange(20), pictures()[:20]), (np.arange(20, 40), pictures()[:20])])


def samples_of(pair):
    ids, (inputs, targets) = pair
    return list(zip(ids, zip(inputs, targets, strict=True), strict=True))


@pytest.mark.parametrize(
    "wrap, samples",
    [
        (lambda pairs: pairs, 40),
        (tuple, 40),
        (lambda pairs: DataLoader([pair for one in pairs for pair in samples_of(one)], batch_size=16), 40),
        (lambda pairs: DataLoader(pairs, batch_size=None), None),
        (lambda pairs: Stream(), None),
        (lambda pairs: DataLoader(Stream(), batch_size=None), None),
    ],
)
def test_data_of_every_kind(wrap, samples, recorder, network, pictures):
    network.float()
    pairs = [(ids, (pictures[0][ids].float(), pictures[1][ids])) for ids in torch.arange(40).split(15)]
    estimate = recorder.estimate(wrap(pairs))
    assert estimate.samples == samples
    if samples is None:
        assert (estimate.bytes, estimate.bfloat16_bytes, estimate.seconds, estimate.fits) == (None,) * 4
        assert "for each sample; the data does not tell how many there are" in str(estimate)
    assert estimate.bytes_per_sample > 0


def test_nothing_is_left_behind(network, pictures, tmp_path):
    network.head.weight.grad = torch.ones_like(network.head.weight)
    with metaql.Recorder(network, tmp_path / "store") as recorder:
        before, files = {name: each.clone() for name, each in network.state_dict().items()}, files_of(tmp_path)
        state = torch.random.get_rng_state()
        recorder.estimate(TensorDataset(*pictures))
        assert files_of(tmp_path) == files
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(network.head.weight.grad, torch.ones_like(network.head.weight))
    assert network.conv.weight.grad is None
    assert all(torch.equal(before[name], each) for name, each in network.state_dict().items())


def test_the_check_of_the_first_batch_serves_the_recording(recorder, pictures, monkeypatch):
    examined, examine = [], SampleGradients._examine
    monkeypatch.setattr(SampleGradients, "_examine", lambda *given: examined.append(1) or examine(*given))
    recorder.estimate(TensorDataset(*pictures), batch_size=20)
    recorder.collect(TensorDataset(*pictures), "train", batch_size=20)
    assert len(examined) == 1


def test_a_disk_that_is_too_small(recorder, pictures, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(9000, 0, 9000))
    estimate = recorder.estimate(TensorDataset(*pictures))
    assert not estimate.fits
    assert "9.0 kB are free, so it does NOT fit" in str(estimate)


@pytest.mark.parametrize(
    "data, message",
    [
        (iter([]), "can be gone through only once"),
        ((pair for pair in ()), r"is a generator.*Pass something that can be read again"),
        ([], "data holds no samples"),
        (7, "is a int"),
    ],
)
def test_data_that_tells_nothing(data, message, recorder):
    with pytest.raises(errors.BatchError, match=message):
        recorder.estimate(data)


def test_a_model_that_can_not_be_recorded_as_it_is(pictures, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(36, 3)).double()
    with (
        metaql.Recorder(model, tmp_path / "store") as recorder,
        pytest.raises(errors.ModelStateError, match="dropout makes a gradient unrepeatable"),
    ):
        recorder.estimate(TensorDataset(*pictures))
