"""Recording along the training, against the loop over samples at the weights of each step."""

import copy
from contextlib import closing, nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import metaql
from metaql import errors
from metaql.storage import tables
from metaql.storage.recording import trajectory, watched_step
from metaql.storage.store import Store
from tests.recording.reference import assert_close, by_loop, gradients_of_rows


class Sequence(nn.Module):
    """Attention with time first, whose out-projection sees rows flattened in (time, sample) order."""

    def __init__(self):
        super().__init__()
        self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        h = self.words(x).transpose(0, 1)
        return self.head(self.attention(h, h, h)[0].mean(0))


def train(model, data, path, reduction="mean", steps=4, size=8, scaler=None, **options):
    """Records some steps; returns what each step's samples had for gradients, by the loop."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    expected = []
    with metaql.Recorder(model, path, dtype="float64", **options) as recorder:
        for _ in range(steps):
            ids = torch.randperm(len(data[0]))[:size]
            batch = (data[0][ids], data[1][ids])
            expected.append(by_loop(model, batch, size))
            optimizer.zero_grad()
            with recorder.step(ids, optimizer, reduction=reduction):
                losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
                loss = _reduce(losses, reduction)
                (loss if scaler is None else scaler.scale(loss)).backward()
            optimizer.step()
    return expected


def _reduce(losses, reduction):
    if isinstance(reduction, str):
        return losses.mean() if reduction == "mean" else losses.sum()
    return (losses * reduction).sum()


def assert_steps(path, expected):
    store = Store.open(path)
    table = tables.gradients(store)
    for number, gradients in enumerate(expected, start=1):
        rows = table.column("row").to_numpy()[table.column("step").to_numpy() == number]
        assert_close(gradients_of_rows(store, rows), gradients, 1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum", torch.linspace(-1, 2, 8, dtype=torch.float64)])
def test_every_step_has_the_samples_own_gradients(reduction, network, pictures, tmp_path):
    assert_steps(tmp_path / "store", train(network, pictures, tmp_path / "store", reduction))


def test_a_scaled_loss_is_unscaled(network, pictures, tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert_steps(tmp_path / "store", train(network, pictures, tmp_path / "store", scaler=scaler))
    assert torch.amp.GradScaler.scale.__module__ == "torch.amp.grad_scaler"


@pytest.mark.parametrize("size, length", [(8, 5), (6, 6), (4, 8)])
def test_samples_are_found_where_the_shape_does_not_tell(size, length, tmp_path):
    model = Sequence().double()
    data = torch.randint(0, 11, (20, length)), torch.randint(0, 3, (20,))
    assert_steps(tmp_path / "store", train(model, data, tmp_path / "store", size=size))


def test_gradients_that_batch_norm_cancels_are_rounding_and_no_reason_to_refuse(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with metaql.Recorder(model, tmp_path / "store") as recorder, recorder.step(range(16), optimizer):
        F.cross_entropy(model(torch.randn(16, 1, 32, 32)), torch.arange(16) % 4).backward()
    got = gradients_of_rows(Store.open(tmp_path / "store"), np.arange(16))
    for name, parameter in model.named_parameters():
        assert torch.allclose(got[name].mean(0), parameter.grad.flatten(), atol=1e-4)


def test_steps_of_one_kind_are_examined_once_whatever_is_logged(monkeypatch, network, pictures, tmp_path):
    """Batches taken by an index, losses that Python looks at, before and after: none of it moves the samples."""
    examined = []
    examine = watched_step.WatchedStep._align
    monkeypatch.setattr(watched_step.WatchedStep, "_align", lambda self: examined.append(self) or examine(self))
    optimizer, expected, seen = torch.optim.SGD(network.parameters(), lr=0.1), [], 0.0
    with metaql.Recorder(network, tmp_path / "store", dtype="float64") as recorder:
        for _ in range(3):
            ids = torch.randperm(len(pictures[0]))[:8]
            expected.append(by_loop(network, (pictures[0][ids], pictures[1][ids]), 8))
            optimizer.zero_grad()
            with recorder.step(ids, optimizer):
                loss = F.cross_entropy(network(pictures[0][ids]), pictures[1][ids])
                seen += loss.item()
                assert not loss.isnan()
                loss.backward()
                seen += (2 * loss).item()
            optimizer.step()
    assert len(examined) == 1
    assert_steps(tmp_path / "store", expected)


def test_the_optimizers_settings_are_kept_for_each_step(network, pictures, tmp_path):
    train(network, pictures, tmp_path / "store", steps=2)
    first, second = tables.steps(Store.open(tmp_path / "store")).to_pylist()
    assert first == {
        "step": 1, "parameter_group": 0, "epoch": None, "learning_rate": 0.1, "momentum": 0.9, "dampening": 0.0,
        "nesterov": False, "maximize": False, "weight_decay": 0.0, "buffer_fresh": True, "batch_size": 8,
        "reduction": "mean", "sample_factor": 0.125, "optimizer": "SGD", "updates": 0, "update": 1,
        "gradient_factor": 1.0,
    }  # fmt: skip
    assert (second["step"], second["buffer_fresh"]) == (2, False)


def test_steps_go_on_counting_when_a_run_is_continued(network, pictures, tmp_path):
    expected = [each for _ in range(2) for each in train(network, pictures, tmp_path / "store", steps=2)]
    assert_steps(tmp_path / "store", expected)


def test_steps_are_committed_now_and_then(network, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(trajectory, "COMMIT_BYTES", 1)
    expected = train(network, pictures, tmp_path / "store", steps=3)
    assert len(Store.open(tmp_path / "store").manifest.collections) == 3
    assert_steps(tmp_path / "store", expected)


def test_training_is_not_disturbed(network, pictures, tmp_path):
    alone = copy.deepcopy(network)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(4):
        ids = torch.randperm(40)[:8]
        optimizer.zero_grad()
        F.cross_entropy(alone(pictures[0][ids]), pictures[1][ids]).backward()
        optimizer.step()
    torch.manual_seed(1)
    train(network, pictures, tmp_path / "store")
    for one, other in zip(alone.parameters(), network.parameters(), strict=True):
        assert torch.equal(one, other)


def test_batch_norm_and_dropout_are_recorded_as_seen(pictures, tmp_path):
    """With the batch's own statistics held, the samples' gradients add up to the batch's."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder,
        recorder.step(range(40), optimizer),
    ):
        F.cross_entropy(model(pictures[0]), pictures[1]).backward()
    got = gradients_of_rows(Store.open(tmp_path / "store"), np.arange(40))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[name].mean(0), parameter.grad.flatten(), rtol=1e-9, atol=1e-12)


# What is refused.


def step(model, data, path, ids=range(8), **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with (
        metaql.Recorder(model, path, dtype="float64") as recorder,
        recorder.step(ids, optimizer, **options),
    ):
        F.cross_entropy(model(data[0][:8]), data[1][:8]).backward()


def test_a_parameter_without_factors_is_named_with_its_share(pictures, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.GRUCell(36, 4), nn.Linear(4, 3)).double()
    with pytest.raises(errors.UnsupportedParameterError, match=r"'1.weight_ih' \(\d+% of .*, in gru_cell\)"):
        step(model, pictures, tmp_path / "store")


@pytest.mark.parametrize("ids", [range(7), range(9), range(4), range(16)])
def test_a_wrong_number_of_ids(ids, network, pictures, tmp_path):
    with pytest.raises(errors.SampleIdError, match="Give one id for each"):
        step(network, pictures, tmp_path / "store", ids=ids)


def test_a_loss_that_is_not_a_number(network, pictures, tmp_path):
    pictures[0][2] = torch.nan
    with pytest.raises(errors.NotFiniteError, match="brings NaN or infinity to what uses"):
        step(network, pictures, tmp_path / "store")


def test_what_the_factors_make_infinite(network, pictures, tmp_path):
    """Finite in the pass, and in float64, where it is not yet divided by its samples' factors."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with metaql.Recorder(network, tmp_path / "store", dtype="float32") as recorder:
        for factor, problem in ((0.125, None), (1e-45, "for sample 0"), (1e-320, "for sample 0")):
            network.zero_grad()
            expected = pytest.raises(errors.NotFiniteError, match=problem) if problem else nullcontext()
            factors = torch.full((8,), factor, dtype=torch.float64)
            with expected, recorder.step(torch.arange(8), optimizer, reduction=factors):
                F.cross_entropy(network(pictures[0][:8]), pictures[1][:8]).backward()
        assert recorder._trajectory.steps == 1


@pytest.mark.parametrize(
    "order", [torch.arange(7, -1, -1), [1, 0, *range(2, 8)], np.roll(np.arange(8), 3), (torch.tensor([7, *range(7)]),)]
)
def test_a_batch_that_is_put_in_another_order_within_the_step(order, network, pictures, tmp_path):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    inputs, targets = (each[:8] for each in pictures)
    with metaql.Recorder(network, tmp_path / "store", dtype="float64") as recorder:
        with recorder.step(range(8), optimizer):
            F.cross_entropy(network(inputs[torch.arange(8)]), targets[list(range(8))]).backward()
        with pytest.warns(UserWarning, match="put in another order"), recorder.step(range(8), optimizer):
            F.cross_entropy(network(inputs[order]), targets[order]).backward()


class Words(nn.Module):
    """One prediction for each of eight positions, and their mean: as many as the batch has samples."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x).mean(1)


def _of_parts(model, data, size):
    return [F.cross_entropy(model(x), y) for x, y in zip(data[0].split(size), data[1].split(size), strict=True)]


def _one_after_another(model, data, size):
    for x, y in zip(data[0].split(size), data[1].split(size), strict=True):
        F.cross_entropy(model(x), y).backward()


def _both_first(model, data):
    losses = [F.cross_entropy(model(data[0]), data[1]), model(data[0]).square().mean()]
    for loss in losses:
        loss.backward()


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(
    "within, error, message",
    [
        (lambda m, d: m(d[0]), errors.ModelStateError, "ran inside .*, but no backward pass did. Call loss.backward"),
        (lambda m, d: None, errors.ModelStateError, "No backward pass ran inside .*, nor did the recorded model"),
        (lambda m, d: d[2].backward(), errors.UnsupportedParameterError, "If the forward pass ran outside .* put it"),
        (lambda m, d: d[3].backward(), errors.ModelStateError, "came to none of the recorded parameters"),
        (_both_first, errors.ModelStateError, "2 backward passes ran inside .*, each of a forward pass of its own"),
        (lambda m, d: _one_after_another(m, d, 4), errors.ModelStateError, r"\d backward passes .* reduction="),
        (lambda m, d: _one_after_another(m, d, 1), errors.ModelStateError, r"\d backward passes .* a recorder.step"),
        (lambda m, d: sum(_of_parts(m, d, 4)).backward(), errors.SampleIdError, r"8 samples, .* ran 2 times .* \[4, "),
        (lambda m, d: sum(_of_parts(m, d, 1)).backward(), errors.SampleIdError, r"8 samples, .* ran 8 times .* \[1, "),
        (lambda m, d: torch.stack(_of_parts(m, d, 1)).mean().backward(), errors.SampleIdError, "ran 8 times"),
    ],
)
def test_passes_that_are_not_one_of_each(within, error, message, positions, network, pictures, tmp_path):
    """One forward pass and its backward pass make a step: nothing else is recorded, least of all wrongly."""
    model = Words().double() if positions else network
    data = torch.randn(8, 8, 6).double() if positions else pictures[0][:8], pictures[1][:8]
    outside = F.cross_entropy(model(data[0]), data[1])
    others = torch.ones(8, requires_grad=True).sum()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        with pytest.raises(error, match=message), recorder.step(range(8), optimizer):
            within(model, (*data, outside, others))
        with recorder.step(range(8), optimizer):
            F.cross_entropy(model(data[0]), data[1]).backward()
    assert Store.open(tmp_path / "store").manifest.collections[0].rows == 8


def test_parts_of_a_batch_in_steps_of_their_own(network, pictures, tmp_path):
    """As the errors advise: gradients add up, and reduction says what the division of the losses was."""
    inputs, targets = (each[:8] for each in pictures)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    expected = by_loop(network, (inputs, targets), 8)
    with metaql.Recorder(network, tmp_path / "store", dtype="float64") as recorder:
        for own in (slice(0, 4), slice(4, 8)):
            with recorder.step(range(8)[own], optimizer, reduction=torch.full((4,), 1 / 8)):
                (F.cross_entropy(network(inputs[own]), targets[own]) / 2).backward()
        optimizer.step()
    assert_close(gradients_of_rows(Store.open(tmp_path / "store"), np.arange(8)), expected, 1e-9)


def test_samples_without_a_dimension_of_their_own(tmp_path):
    model, inputs = nn.Linear(6, 3).double(), torch.randn(8, 6).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with metaql.Recorder(model, tmp_path / "store") as recorder:
        message = r"8 samples, but the model ran 8 times .*, 'weight' first on an input of shape \[6\]"
        with pytest.raises(errors.SampleIdError, match=message), recorder.step(range(8), optimizer):
            sum(F.cross_entropy(model(each), torch.tensor(1)) for each in inputs).backward()


def test_losses_of_one_forward_pass_may_go_backwards_one_by_one(network, pictures, tmp_path):
    inputs, targets = (each[:8] for each in pictures)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    expected = by_loop(network, (inputs, targets), 8)
    with (
        metaql.Recorder(network, tmp_path / "store", dtype="float64") as recorder,
        recorder.step(range(8), optimizer, reduction="sum"),
    ):
        for loss in F.cross_entropy(network(inputs), targets, reduction="none"):
            loss.backward(retain_graph=True)
    assert_steps(tmp_path / "store", [expected])


@pytest.mark.parametrize("reduction", ["none", torch.ones(7), torch.zeros(8)])
def test_a_reduction_that_does_not_fit(reduction, network, pictures, tmp_path):
    with pytest.raises(errors.BatchError, match="reduction"):
        step(network, pictures, tmp_path / "store", reduction=reduction)


def test_a_gradient_changed_by_a_hook(network, pictures, tmp_path):
    network.head.weight.register_hook(lambda gradient: gradient * 2)
    with pytest.raises(errors.UnsupportedParameterError, match=r"'head.weight' do not add up"):
        step(network, pictures, tmp_path / "store")


def test_an_error_of_the_users_leaves_no_hooks(network, pictures, tmp_path):
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with metaql.Recorder(network, tmp_path / "store", dtype="float64") as recorder:
        with pytest.raises(ZeroDivisionError), recorder.step(range(8), optimizer):
            F.cross_entropy(network(pictures[0][:8]), pictures[1][:8]).backward(1 / 0)
        assert all(not each._backward_hooks for each in network.parameters())
    assert Store.open(tmp_path / "store").manifest.collections == ()


class Sorting(nn.Module):
    """Runs its samples in another order, and puts the results back."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        order = torch.argsort(x[:, 0])
        return self.head(torch.tanh(self.inner(x[order])))[torch.argsort(order)]


def test_rows_in_another_order_are_refused(tmp_path):
    data = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    with pytest.raises(errors.SampleIdError, match="can't be told apart"):
        step(Sorting().double(), data, tmp_path / "store")


def test_an_index_that_keeps_samples_in_their_places(tmp_path):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.head = nn.Embedding(11, 8), nn.Linear(8, 3)

        def forward(self, x):
            h = torch.tanh(self.words(x))
            return self.head(h[torch.arange(len(x)), (x > 2).sum(1).clamp(max=4)])

    data = torch.randint(0, 11, (20, 5)), torch.randint(0, 3, (20,))
    assert_steps(tmp_path / "store", train(Last().double(), data, tmp_path / "store"))


class Positions(nn.Module):
    """Looks a row's place up in a buffer, as transformers do; batch norm counts its batches in another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("order", torch.arange(8).expand(1, -1))
        self.register_buffer("turned", torch.arange(8).flip(0).expand(1, -1))
        self.places, self.norm, self.head = nn.Embedding(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x):
        places = torch.gather(self.turned.expand(len(x), -1), 1, self.order.expand(len(x), -1))
        h = self.places(places[:, : x.shape[1]]) * x.unsqueeze(2)
        return self.head(self.norm(h.sum(1)))


def test_rows_that_buffers_move_are_found_once(tmp_path, monkeypatch):
    found = []
    align = watched_step.align_backwards
    monkeypatch.setattr(watched_step, "align_backwards", lambda *given: found.append(1) or align(*given))
    model = Positions().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for _ in range(3):
            with recorder.step(range(5), optimizer):
                F.cross_entropy(model(torch.randn(5, 6).double()), torch.randint(0, 3, (5,))).backward()
    assert len(found) == 1


@pytest.mark.parametrize("first", ["step", "collect"])
def test_a_checkpoint_and_steps_share_their_layers_whatever_their_first_batches_show(first, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 3))
    dead = torch.zeros(4, 1, 8, 8), torch.arange(4) % 3
    alive = torch.randn(4, 1, 8, 8), torch.arange(4) % 3
    with torch.no_grad():
        model[0].bias.fill_(-0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with metaql.Recorder(model, tmp_path / "store") as recorder:
        for way in ("step", "collect") if first == "step" else ("collect", "step"):
            inputs, targets = dead if way == first else alive
            if way == "step":
                with recorder.step(range(4), optimizer):
                    F.cross_entropy(model(inputs), targets).backward()
            recorder.checkpoint()
            if way == "collect":
                recorder.collect([(range(4), (inputs, targets))], "validation")
    with closing(Store.open(tmp_path / "store")) as store:
        assert len(store.manifest.collections) == 2
