"""Training loops as people write them, around models of transformers: mixed precision, accumulation, checkpointing."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metaql
from metaql.storage import tables
from metaql.storage.store import Store
from tests.models.batches import CLASSES, named, of_classes
from tests.models.loop import assert_collected, assert_stepped, by_loop
from tests.models.test_bert import bert
from tests.models.test_decoders import gpt2
from tests.recording.reference import assert_close, gradients_of_rows

BATCHES = ((4, 6), (4, 6), (2, 5), (1, 3))


def network():
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, CLASSES))


def vectors(samples=6):
    return torch.randn(samples, 6, dtype=torch.float64), torch.arange(samples) % CLASSES


def recorded(path, step):
    """name => the gradients of the samples of a step, in the order of the batch."""
    store = Store.open(path)
    table = tables.gradients(store)
    return gradients_of_rows(store, table.column("row").to_numpy()[table.column("step").to_numpy() == step])


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant, tmp_path):
    """Reentrant checkpointing runs out of sight, so that every sample is run alone."""
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # transformers checkpoints in training mode alone; without dropout that is no other than evaluation.
    model.train()
    batches = named(sizes=BATCHES)
    with metaql.Recorder(model, tmp_path / "store", losses=of_classes, dtype="float64") as recorder:
        recorder.checkpoint()
        recorder.collect([(range(4), batches[0][1])], "train")
        recorder.collect([(range(4), batches[1][1])], "test")
    store = Store.open(tmp_path / "store")
    for split, (_, batch) in zip(("train", "test"), batches, strict=False):
        rows = [each["row"] for each in tables.gradients(store).to_pylist() if each["split"] == split]
        assert_close(gradients_of_rows(store, np.array(rows)), by_loop(model, batch, 4, of_classes), 1e-9)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_steps_with_activation_checkpointing(tmp_path):
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_stepped(model, named(sizes=BATCHES), tmp_path / "store", of_classes)


def test_collected_in_bfloat16(tmp_path):
    """Autocast within losses=: exact to the rounding that it brings."""

    def losses(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return of_classes(model, batch)

    assert_collected(bert().float(), named(sizes=BATCHES), tmp_path / "store", losses, tolerance=0.05)


def test_collected_in_half_the_weights(tmp_path):
    """A model whose weights are bfloat16 themselves."""
    inputs, classes = vectors()

    def losses(model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")

    assert_collected(
        network().bfloat16(), [(6, (inputs.bfloat16(), classes))], tmp_path / "store", losses, tolerance=0.05
    )


def test_steps_in_mixed_precision(tmp_path):
    """Autocast to bfloat16, a GradScaler, clipping and an update, as the documentation of torch has them."""
    model, (inputs, classes) = network(), vectors()
    inputs = inputs.float()
    optimizer, scaler = torch.optim.AdamW(model.parameters()), torch.amp.GradScaler("cpu", init_scale=256.0)

    def losses(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    expected = []
    with metaql.Recorder(model, tmp_path / "store") as recorder:
        for _ in range(3):
            expected.append(by_loop(model, (inputs, classes), 6, losses))
            optimizer.zero_grad()
            with recorder.step(range(6), optimizer):
                scaler.scale(losses(model, (inputs, classes)).mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    for number, gradients in enumerate(expected, start=1):
        assert_close(recorded(tmp_path / "store", number), gradients, 0.05)


def test_gradients_accumulated_over_steps(tmp_path):
    """Each part of a batch is a step of its own; its loss is divided, which the factors say."""
    model, parts = network().double(), 3
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = [vectors(4) for _ in range(parts)]
    factors = torch.full((4,), 1 / 4 / parts, dtype=torch.float64)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for number, (inputs, classes) in enumerate(data):
            with recorder.step(range(4 * number, 4 * number + 4), optimizer, reduction=factors):
                (F.cross_entropy(model(inputs), classes) / parts).backward()
    for number, batch in enumerate(data, start=1):
        expected = by_loop(model, batch, 4, lambda model, b: F.cross_entropy(model(b[0]), b[1], reduction="none"))
        assert_close(recorded(tmp_path / "store", number), expected, 1e-9)


def test_the_models_own_mean_over_words(tmp_path):
    """The loss of transformers is a mean over all words of the batch, so a sample's factor is its share of them."""
    model, (_, batch) = gpt2().eval(), named("words", ((4, 6),))[0]
    words = (batch["labels"][:, 1:] != -100).sum(1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def mean_of_own_words(model, one):
        return model(**one).loss.unsqueeze(0)

    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        expected = by_loop(model, batch, 4, mean_of_own_words)
        with recorder.step(range(4), optimizer, reduction=words / words.sum()):
            model(**batch).loss.backward()
    # That loss is computed in float32.
    assert_close(recorded(tmp_path / "store", 1), expected, 1e-6)


def test_layers_that_thaw(tmp_path):
    """Parameters may begin to train before anything is recorded; afterwards the store keeps to those it has."""
    model, batch = network().double(), vectors()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model[0].requires_grad_(False)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        model[0].requires_grad_(True)
        with recorder.step(range(6), optimizer):
            F.cross_entropy(model(batch[0]), batch[1]).backward()
        recorder.checkpoint()
        assert "0.weight" in recorded(tmp_path / "store", 1)
        model[0].requires_grad_(False)
        with pytest.raises(metaql.errors.ModelStateError, match=r"'0\.weight'.*missing here"):
            recorder.step(range(6), optimizer)


def test_metrics_are_read_within_a_step(tmp_path):
    model, batches = network().double(), [(6, vectors()) for _ in range(3)]
    seen = []

    def losses(model, batch):
        logits = model(batch[0])
        seen.append((logits.argmax(1) == batch[1]).double().mean().item())
        return F.cross_entropy(logits, batch[1], reduction="none")

    assert_stepped(model, batches, tmp_path / "store", losses)
    assert_collected(model, batches, tmp_path / "collected", losses)
