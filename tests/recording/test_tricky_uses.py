"""Uses that look like others and are not: collected exactly all the same, and along the trajectory exactly or not."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metaql
from metaql import errors
from metaql.storage.recording.losses import ModelLosses
from metaql.storage.recording.sample_gradients import SampleGradients
from metaql.storage.store import Store
from tests.models.loop import by_loop, classified
from tests.recording.reference import assert_close, gradients_of_rows, split_by_parameter
from tests.recording.using import Using, captured, numbers

# As many samples as positions and as features, so that no shape tells which is which.
SAMPLES = 4
SQUARE = numbers(4, 4)


def without_samples(model, x):
    """Queries that are a parameter pass through a layer before any sample is there."""
    queries = torch.tanh(F.linear(model.p[0], model.w))
    return x @ queries


def changed_in_place(model, x):
    h = torch.tanh(x) * 1
    out = h + model.p
    h.zero_()
    return out.mul_(2)


def added_in_place(model, x):
    h = torch.tanh(x) * 1
    h.add_(model.p).sub_(model.w)
    h += model.p
    return h


def partly_without_gradient(model, x):
    with torch.no_grad():
        held = model.w[:2]
    return torch.cat([F.linear(x, held), F.linear(x, model.w[2:]), x @ model.w.detach()], -1)


def same_table_both_ways(model, x):
    places = F.embedding(torch.arange(4), model.w)
    return torch.tanh(x + places) @ places.T


def a_table_changed_in_place(model, x):
    places = F.embedding(torch.arange(4), model.w)
    places.mul_(2)
    return x + places


def shifted_lookup(model, x):
    return torch.add(x, F.embedding(torch.arange(4), model.w), alpha=3) + torch.add(x, model.w, alpha=2)


def lookup_in_another_order(model, x):
    """A view of the looked up rows that has their shape and not their order."""
    return x + F.embedding(torch.arange(4), model.w).view(4, 4).t()


def copies_of_copies(model, x):
    copies = model.p.expand(len(x), 4, 4)
    return copies[0] * x + copies[:, :1] * x + model.p


def copied_over_time(model, x):
    """Copied, but not for samples."""
    return x + model.w[:1].expand(4, 4) * model.w[0].repeat(4, 1)


def in_a_list(model, x):
    return torch.stack([model.w[0], model.w[1]]).sum(0) * x + torch.cat([model.w, model.w]).sum(0) * x


def also_a_scale(model, x):
    return F.layer_norm(x, (4,), model.w[0].clone(), None) + x * model.w + F.layer_norm(x, (4, 4), model.w)


def both_sides(model, x):
    return model.w @ x @ model.w + model.w @ x.transpose(1, 2) + model.w @ model.w + model.w * model.w


def product_of_parameters(model, x):
    """W of low rank in the place of a weight, and last, so that nothing after it tells samples apart."""
    return x @ (model.w @ model.p[0])


def a_constant_of_the_samples_number(model, x):
    return x.mean(1) @ (SQUARE * model.p[0, 0])


def overlapping(model, x):
    return x * model.w.flatten().unfold(0, 4, 4) + x * model.w.as_strided((4, 4), (1, 1)) + x


def shifted_by_a_number(model, x):
    halves = model.p[0].float().double()
    return F.linear(x, model.w + 1) * (model.p - 2) + x * (1 + (1 + model.p)) + halves @ x


def shifted_and_more(model, x):
    """What else is done with a shifted parameter is not done with the parameter."""
    shifted = model.w + 1
    scaled = (model.p + 3).mul_(2)
    return x / (model.w + 30) + x * shifted[0] + x * (1 - model.p) + x * scaled + torch.add(x, model.w, alpha=2)


def shifted_without_gradient(model, x):
    with torch.no_grad():
        held = model.w + 1
    return x * held + x @ model.w + model.p


def beside_whole_numbers(model, x):
    return x.round().long() * model.w + (x > 0) * model.p + x


RECORDED = [
    changed_in_place, added_in_place, partly_without_gradient, overlapping, shifted_without_gradient,
    beside_whole_numbers,
]  # fmt: skip
REFUSED = [
    without_samples, same_table_both_ways, a_table_changed_in_place, shifted_lookup, lookup_in_another_order,
    copies_of_copies, copied_over_time, in_a_list, also_a_scale, both_sides, product_of_parameters,
    a_constant_of_the_samples_number, shifted_by_a_number, shifted_and_more,
]  # fmt: skip


def step(model, batch, path):
    optimizer, ids = torch.optim.SGD(model.parameters(), lr=0.1), range(len(batch[1]))
    with metaql.Recorder(model, path, dtype="float64") as recorder, recorder.step(ids, optimizer):
        classified(model, batch).mean().backward()


def model_of(function):
    return Using(function, w=numbers(4, 4), p=numbers(1, 4, 4))


@pytest.mark.filterwarnings("ignore:Recorded by running samples one by one")
@pytest.mark.parametrize("samples", [1, 3, SAMPLES, 8])
@pytest.mark.parametrize("function", RECORDED + REFUSED)
def test_collected(function, samples):
    model = model_of(function)
    batch = numbers(samples, 4, 4), torch.arange(samples) % 3
    source = SampleGradients(ModelLosses(model, None), dict(model.named_parameters()), "float64")
    for _ in range(2):
        blocks = source.of(batch, np.arange(samples)).blocks
        expected = by_loop(model, batch, samples, classified)
        assert_close(split_by_parameter(source.layers, blocks), expected, 1e-9)


@pytest.mark.parametrize("samples", [3, SAMPLES, 8])
@pytest.mark.parametrize("function", RECORDED)
def test_recorded_along_the_trajectory(function, samples, tmp_path):
    model = model_of(function)
    batch = numbers(samples, 4, 4), torch.arange(samples) % 3
    expected = by_loop(model, batch, samples, classified)
    step(model, batch, tmp_path / "store")
    assert_close(gradients_of_rows(Store.open(tmp_path / "store"), np.arange(samples)), expected, 1e-9)


@pytest.mark.parametrize("samples", [3, SAMPLES, 8])
@pytest.mark.parametrize("function", REFUSED)
def test_refused_along_the_trajectory(function, samples, tmp_path):
    """What can be told only by running it again."""
    batch = numbers(samples, 4, 4), torch.arange(samples) % 3
    with pytest.raises((errors.UnsupportedParameterError, errors.SampleIdError), match=r"'[wp]'"):
        step(model_of(function), batch, tmp_path / "store")


class Attending(nn.Module):
    """Attention over x, to itself or to another sequence, with whichever masks."""

    def __init__(self, other, batch_first, masks, need_weights, **options):
        super().__init__()
        self.other, self.masks, self.need_weights = other, masks, need_weights
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.batch_first, self.head = batch_first, nn.Linear(4, 3)

    def forward(self, x):
        key = {"self": x, "cross": torch.tanh(x[:, :3]), "values": torch.tanh(x)}[self.other]
        value = torch.sin(x) if self.other == "values" else key
        masks = {}
        if "keys" in self.masks:
            masks["key_padding_mask"] = key[..., 0] > key[:, :1, 0]
        if "pairs" in self.masks:
            masks["attn_mask"] = torch.ones(x.shape[1], key.shape[1]).tril().logical_not()
        if not self.batch_first:
            x, key, value = (each.transpose(0, 1) for each in (x, key, value))
        out, weights = self.attention(x, key, value, need_weights=self.need_weights, **masks)
        out = out if self.batch_first else out.transpose(0, 1)
        return self.head(out.mean(1)) + (weights[..., :1].mean(1) if self.need_weights else 0)


@pytest.mark.parametrize("samples", [1, 5, 6])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("other", ["self", "cross", "values"])
@pytest.mark.parametrize(
    "masks, need_weights, options",
    [
        ((), True, {}),
        (("keys",), False, {}),
        (("pairs",), False, {"bias": False}),
        (("keys", "pairs"), True, {"add_bias_kv": True}),
    ],
)
def test_attention(samples, batch_first, other, masks, need_weights, options, tmp_path):
    model = Attending(other, batch_first, masks, need_weights, **options).double().eval()
    batch = numbers(samples, 6, 4), torch.arange(samples) % 3
    expected = by_loop(model, batch, samples, classified)
    captured(model, batch, samples, loop=lambda *_: expected)
    step(model, batch, tmp_path / "store")
    assert_close(gradients_of_rows(Store.open(tmp_path / "store"), np.arange(samples)), expected, 1e-9)
