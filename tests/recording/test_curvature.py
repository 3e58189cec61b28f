"""Curvature that is gathered while recording, against moments and gradients of a plain loop over hooks and autograd."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from metaql.errors import BatchError, CorruptStoreError, ModelStateError, NotFiniteError, RecordingError
from metaql.methods.curvature import as_matrices, as_vectors
from metaql.storage.check import check
from metaql.storage.curvatures import unpack
from metaql.storage.info import info
from metaql.storage.maintenance import drop_checkpoint, vacuum
from metaql.storage.recording.recorder import Recorder
from metaql.storage.recording.sampled_labels import with_sampled_labels
from metaql.storage.store import Store
from tests.recording.reference import by_loop


@pytest.fixture
def collected(recorder, pictures):
    """The recorder of the network after a collection, and its data."""
    data = TensorDataset(*pictures)
    recorder.collect(data, "train")
    return recorder, data


def fitted(path, method):
    """Each layer's curvature that the newest fit serves for, from the disk."""
    store = Store.open(path)
    return unpack(store.layers, store.curvature(store.manifest.curvatures[-1]), method)


def hooked(network, inputs, targets):
    """name => (suffix [n, s, i], prefix [n, s, o]) of the network's linear layers and convolutions."""
    found, handles = {}, []

    def keep(name, module, inputs, output):
        (values,) = inputs
        if isinstance(module, nn.Conv2d):
            values = F.unfold(values, module.kernel_size, padding=module.padding).transpose(1, 2)
        values = values.detach().reshape(len(values), -1, values.shape[-1])
        output.register_hook(lambda dy: found.__setitem__(name, (values, dy)))

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_hook(lambda m, i, o, name=name: keep(name, m, i, o)))
    F.cross_entropy(network(inputs), targets, reduction="sum").backward()
    network.zero_grad()
    for handle in handles:
        handle.remove()
    return {name: (a, b.reshape(*b.shape[:2], -1).transpose(1, 2)) for name, (a, b) in found.items()}


def plain(suffix, prefix, gradients, method):
    """(eigenvectors of A, of S, eigenvalues) of a layer with a bias, by loops."""
    rows = torch.cat([suffix, torch.ones_like(suffix[..., :1])], -1).flatten(0, 1)
    a = sum(torch.outer(row, row) for row in rows) / len(rows)
    b = sum(torch.outer(row, row) for row in prefix.flatten(0, 1)) / len(prefix)
    (a_values, q_a), (b_values, q_b) = torch.linalg.eigh(a), torch.linalg.eigh(b)
    if method == "kfac":
        return q_a, q_b, torch.outer(b_values, a_values)
    matrices = as_matrices(gradients, (1, len(b), len(a)), True).squeeze(1)
    return q_a, q_b, torch.stack([(q_b.T @ each @ q_a).square() for each in matrices]).mean(0)


@pytest.mark.parametrize(
    "method, wanted", [("ekfac", "ekfac"), ("ekfac", "kfac"), ("kfac", "kfac"), ("diagonal", "diagonal")]
)
def test_curvature_of_recorded_labels(collected, network, pictures, method, wanted):
    recorder, data = collected
    assert recorder.curvature(data, method, labels="recorded", batch_size=16) == 40
    got = fitted(recorder._writer.path, wanted)
    gradients = by_loop(network, pictures, 40)
    positions = hooked(network, *pictures)
    assert list(got) == ["conv", "norm", "hidden", "head"]
    for name, curvature in got.items():
        rows = torch.cat([gradients[f"{name}.weight"], gradients[f"{name}.bias"]], dim=1)
        vector = torch.randn(rows.shape[1], dtype=torch.float64)
        if wanted == "diagonal" or name not in positions:
            squares = rows.square().mean(0)
            expected = vector / (squares + 0.1 * squares.mean())
        else:
            q_a, q_b, values = plain(*positions[name], rows, wanted)
            (matrix,) = as_matrices(vector, (1, len(q_b), len(q_a)), True)
            turned = (q_b.T @ matrix @ q_a) / (values + 0.1 * values.mean())
            expected = as_vectors((q_b @ turned @ q_a.T).unsqueeze(0), True)
        torch.testing.assert_close(curvature.precondition(vector), expected, rtol=1e-6, atol=1e-9)


def drawn(network, pictures, seed):
    """The pictures with targets as the recorder draws them, in batches of 16."""
    generator = torch.Generator().manual_seed(seed)
    batches = zip(*(each.split(16) for each in pictures), strict=True)
    targets = torch.cat([with_sampled_labels(network, batch, generator)[1] for batch in batches])
    assert targets.tolist() != pictures[1].tolist()
    return pictures[0], targets


def test_sampled_labels_are_drawn_from_the_model(collected, network, pictures):
    recorder, data = collected
    recorder.curvature(data, batch_size=16)
    got, moments = (fitted(recorder._writer.path, method) for method in ("ekfac", "kfac"))
    first, second = drawn(network, pictures, 1), drawn(network, pictures, 2)
    assert first[1].tolist() != second[1].tolist()
    recorder.curvature(TensorDataset(*first), "kfac", labels="recorded", batch_size=16)
    for name, expected in fitted(recorder._writer.path, "kfac").items():
        torch.testing.assert_close(moments[name].eigenvalues, expected.eigenvalues)
    gradients = by_loop(network, second, 40)
    for name in ("conv", "hidden", "head"):
        # The trace is the same in every basis.
        squares = sum(gradients[f"{name}.{each}"].square().sum(1).mean() for each in ("weight", "bias"))
        torch.testing.assert_close(got[name].eigenvalues.sum(), squares)
    known = [(one.method, one.labels) for one in Store.open(recorder._writer.path).manifest.curvatures]
    assert known == [("ekfac", "sampled"), ("kfac", "recorded")]


def test_draws_follow_the_probabilities():
    class Certain(nn.Module):
        def forward(self, inputs):
            return inputs.log()

    chances = torch.tensor([[0.7, 0.2, 0.1]]).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    _, drawn = with_sampled_labels(Certain(), (chances, torch.zeros(20_000, dtype=torch.int64)), generator)
    np.testing.assert_allclose(drawn.bincount() / 20_000, [0.7, 0.2, 0.1], atol=0.02)
    # Classes in dimension 1, a target for each position, of which the ignored ones stay so.
    maps = torch.tensor([0.0, 1.0]).reshape(1, 2, 1).expand(4, 2, 3)
    targets = torch.tensor([[0, -100, 0]]).expand(4, 3)
    got = with_sampled_labels(Certain(), {"inputs": maps, "labels": targets}, generator)
    assert got["labels"].tolist() == [[1, -100, 1]] * 4


class Words(nn.Module):
    """A table that is the output projection too, one of positions, and a grouped convolution over words."""

    def __init__(self):
        super().__init__()
        self.words, self.places = nn.Embedding(7, 4), nn.Embedding(5, 4)
        self.mix = nn.Conv1d(4, 4, 3, padding=1, groups=2)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, words):
        return self.out(torch.tanh(self.mix((self.words(words) + self.places.weight).transpose(1, 2))).transpose(1, 2))


def next_words(model, words):
    return F.cross_entropy(model(words)[:, :-1].transpose(1, 2), words[:, 1:], reduction="none").sum(1)


def test_other_layers_have_their_diagonal(tmp_path):
    model, words = Words().double(), torch.randint(7, (12, 5))
    batches = [(torch.arange(12), words)]
    with Recorder(model, tmp_path / "store", losses=next_words, dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect(batches, "train")
        with pytest.raises(RecordingError, match=r"nothing here knows what your losses= predict"):
            recorder.curvature(batches)
        recorder.curvature(batches, labels="recorded")
    got = fitted(tmp_path / "store", "ekfac")
    assert got["mix"].eigenvalues.shape == (2, 2, 7)
    expected = by_loop(model, words, 12, next_words)
    for layer, parameter in (("words", "words.weight"), ("places", "places.weight")):
        torch.testing.assert_close(got[layer].eigenvalues.flatten(), expected[parameter].square().mean(0))
    # The trace is the same in every basis.
    trace = sum(expected[f"mix.{each}"].square().sum(1).mean() for each in ("weight", "bias"))
    torch.testing.assert_close(got["mix"].eigenvalues.sum(), trace)


def test_a_second_one_takes_the_place_of_the_first(collected):
    recorder, data = collected
    path = recorder._writer.path
    for method in ("ekfac", "diagonal", "ekfac"):
        recorder.curvature(data, method)
    assert [(one.method, one.number) for one in Store.open(path).manifest.curvatures] == [("diagonal", 2), ("ekfac", 3)]
    assert "curvature    diagonal at checkpoint 1, ekfac at checkpoint 1" in str(info(path))
    recorder.close()
    assert not list(check(path))
    vacuum(path)
    assert sorted(each.name for each in (path / "curvatures").iterdir()) == ["00000002.pt", "00000003.pt"]
    drop_checkpoint(path, 1)
    assert Store.open(path).manifest.curvatures == ()


def test_a_damaged_file_is_found(collected):
    recorder, data = collected
    path = recorder._writer.path
    recorder.curvature(data, "diagonal")
    file = path / "curvatures/00000001.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    store = Store.open(path)
    with pytest.raises(CorruptStoreError, match="is changed"):
        store.curvature(store.manifest.curvatures[0])
    assert any("00000001.pt" in problem for problem in check(path))


def test_what_a_crash_left_is_removed(collected, network):
    recorder, _ = collected
    path = recorder._writer.path
    recorder.close()
    (path / "curvatures").mkdir()
    (path / "curvatures/00000001.pt").write_bytes(b"half")
    with pytest.warns(UserWarning, match=r"removed: curvature 1 \(0.0 MB\)"):
        Recorder(network, path, dtype="float64").close()
    assert not list((path / "curvatures").iterdir())


def test_mistakes(recorder, network, pictures):
    data = TensorDataset(*pictures)
    with pytest.raises(ModelStateError, match=r"call recorder.collect first"):
        recorder.curvature(data)
    recorder.collect(data, "train")
    with pytest.raises(RecordingError, match="method can be 'ekfac', 'kfac', 'diagonal'; not 'shampoo'"):
        recorder.curvature(data, "shampoo")
    with pytest.raises(RecordingError, match="labels can be 'sampled' or 'recorded'; not 'true'"):
        recorder.curvature(data, labels="true")
    with pytest.raises(BatchError, match="'ekfac' reads the data twice"):
        recorder.curvature(iter([(torch.arange(40), pictures)]))
    with pytest.raises(BatchError, match="hold no sample"):
        recorder.curvature([])
    with pytest.raises(NotFiniteError):
        recorder.curvature([(torch.arange(40), (pictures[0] * float("nan"), pictures[1]))], "kfac", labels="recorded")
    with pytest.raises(NotFiniteError, match="The loss of sample 0 is nan"):
        recorder.curvature([(torch.arange(40), (pictures[0] * float("nan"), pictures[1]))])
    with pytest.raises(BatchError, match="can't be run on this batch's inputs"):
        recorder.curvature([(torch.arange(40), (pictures[0].flatten(1), pictures[1]))])
    assert Store.open(recorder._writer.path).manifest.curvatures == ()
    with torch.no_grad():
        network.head.bias += 1
    with pytest.raises(ModelStateError, match="weights have moved"):
        recorder.curvature(data)
