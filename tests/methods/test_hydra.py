"""Influence along training against direct implementations that keep vectors, one sample at a time, in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaql
from metaql.errors import QueryError, RecordingError
from metaql.methods.hydra import Pass, require_updates

SAMPLES, BATCH = 12, 4


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES + 3, 5, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (SAMPLES + 3,), generator=generator)


def gradients(model: nn.Module, ids: Tensor) -> list[list[Tensor]]:
    """Each sample's own, parameter by parameter."""
    inputs, targets = data()
    losses = [F.cross_entropy(model(inputs[each : each + 1]), targets[each : each + 1]) for each in ids.tolist()]
    return [list(torch.autograd.grad(loss, list(model.parameters()))) for loss in losses]


class Direct:
    """The paper's Algorithm 1 without the Hessian: dw/dε of every sample, carried through the updates of SGD.

    ε of a sample is what is added to its weight 1 in the sum of the samples' losses, of which the batch's is a part.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.derivatives = [[torch.zeros_like(each) for each in model.parameters()] for _ in range(SAMPLES)]
        self.buffers: list[list[Tensor | None]] = [[None for _ in model.parameters()] for _ in range(SAMPLES)]

    def update(self, optimizer: Any, shares: dict[int, list[Tensor]]) -> None:
        """``shares``: what each sample of the batch added to the gradient of this update."""
        place = {id(each): number for number, each in enumerate(self.model.parameters())}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                for sample in range(SAMPLES):
                    self._update(sample, place[id(parameter)], group, shares.get(sample))

    def _update(self, sample: int, place: int, group: dict[str, Any], share: list[Tensor] | None) -> None:
        derivative = self.derivatives[sample][place]
        gradient = torch.zeros_like(derivative) if share is None else share[place].clone()
        if group["maximize"]:
            gradient = -gradient
        gradient = gradient + group["weight_decay"] * derivative
        if group["momentum"]:
            before = self.buffers[sample][place]
            buffer = gradient if before is None else group["momentum"] * before + (1 - group["dampening"]) * gradient
            self.buffers[sample][place] = buffer
            gradient = gradient + group["momentum"] * buffer if group["nesterov"] else buffer
        self.derivatives[sample][place] = derivative - group["lr"] * gradient

    def restart(self) -> None:
        """The optimizer's state is lost."""
        self.buffers = [[None for _ in self.model.parameters()] for _ in range(SAMPLES)]

    def influence(self, query: list[Tensor]) -> Tensor:
        """How much more of each sample would have lowered the query samples' mean loss."""
        each = [sum((d * g).sum() for d, g in zip(own, query, strict=True)) for own in self.derivatives]
        return -torch.stack([torch.as_tensor(value) for value in each])


def mean(rows: list[list[Tensor]]) -> list[Tensor]:
    return [torch.stack(each).mean(0) for each in zip(*rows, strict=True)]


def validation() -> list[tuple[Tensor, Any]]:
    inputs, targets = data()
    return [(torch.arange(3), (inputs[SAMPLES:], targets[SAMPLES:]))]


def influence(path: Path, text: str) -> dict[int, float]:
    with metaql.connect(path) as db:
        return dict(db.sql(text).fetchall())


def assert_equal(found: dict[int, float], expected: Tensor) -> None:
    """Samples that were in no step have no row."""
    assert set(found) >= {place for place, value in enumerate(expected.tolist()) if value}
    scores = torch.tensor([found.get(each, 0.0) for each in range(SAMPLES)], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, rtol=1e-9, atol=1e-14)


def run(
    path: Path, groups: Callable[[nn.Module], Any], steps: int = 9, restart: bool = False, **settings: Any
) -> tuple[Direct, nn.Module]:
    """Trains for some steps, recorded and directly, with a schedule of the rate; then collects the query samples."""
    model = network()
    direct = Direct(model)
    inputs, targets = data()
    optimizer = torch.optim.SGD(groups(model), lr=0.3, **settings)
    for first in (0, steps // 2) if restart else (0,):
        last = steps if first or not restart else steps // 2
        if first:
            optimizer = torch.optim.SGD(groups(model), lr=0.3, **settings)
            direct.restart()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        with metaql.Recorder(model, path, dtype="float64") as recorder:
            for step in range(first, last):
                ids = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:BATCH]
                own = gradients(model, ids)
                optimizer.zero_grad()
                with recorder.step(ids, optimizer):
                    F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
                direct.update(
                    optimizer,
                    {int(each): [part / BATCH for part in row] for each, row in zip(ids, own, strict=True)},
                )
                optimizer.step()
                schedule.step()
            recorder.checkpoint(optimizer)
            if last == steps:
                recorder.collect(validation(), "validation")
    return direct, model


def query_mean(model: nn.Module) -> list[Tensor]:
    return mean(gradients(model, torch.arange(SAMPLES, SAMPLES + 3)))


ONE_GROUP = lambda model: model.parameters()  # noqa: E731
TWO_GROUPS = lambda model: [  # noqa: E731
    {"params": list(model[0].parameters()), "lr": 0.1, "weight_decay": 0.3},
    {"params": list(model[2].parameters()), "momentum": 0.5},
]
SETTINGS = [
    {},
    {"weight_decay": 0.1},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.02},
    {"momentum": 0.7, "maximize": True, "weight_decay": 0.01},
]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_option_of_sgd(settings: dict[str, Any], restart: bool, tmp_path: Path) -> None:
    direct, model = run(tmp_path / "store", ONE_GROUP, restart=restart, **settings)
    found = influence(tmp_path / "store", "SELECT * FROM hydra()")
    assert_equal(found, direct.influence(query_mean(model)))


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05}], ids=str)
def test_parameter_groups_of_their_own_settings(settings: dict[str, Any], tmp_path: Path) -> None:
    direct, model = run(tmp_path / "store", TWO_GROUPS, **settings)
    expected = direct.influence(query_mean(model))
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), expected)
    plain = """
WITH query AS (SELECT avg(gradient) AS mean FROM validation)
SELECT g.sample_id, sum(w.weight * inner_product(g.gradient, layers(q.mean, w.parameters)))
FROM gradients g JOIN hydra_weights w USING (step), query q WHERE g.split = 'train' GROUP BY g.sample_id"""
    assert_equal(influence(tmp_path / "store", plain), expected)


def one_step(
    recorder: metaql.Recorder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ids: Tensor,
    divide: float = 1.0,
    split: str = "train",
    **options: Any,
) -> dict[int, list[Tensor]]:
    """A recorded pass, whose gradients are added to those there are; each sample's part of the sum."""
    inputs, targets = data()
    own = gradients(model, ids)
    factor = torch.full((len(ids),), 1 / (len(ids) * divide)) if divide != 1 else "mean"
    with recorder.step(ids, optimizer, split, factor, **options):
        (F.cross_entropy(model(inputs[ids]), targets[ids]) / divide).backward()
    return {int(each): [part / len(ids) / divide for part in row] for each, row in zip(ids, own, strict=True)}


def finish(recorder: metaql.Recorder, optimizer: torch.optim.Optimizer) -> None:
    recorder.checkpoint(optimizer)
    recorder.collect(validation(), "validation")


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.05)


def test_gradients_that_are_accumulated_dropped_and_clipped(tmp_path: Path) -> None:
    model = network()
    direct, optimizer = Direct(model), sgd(model)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for step in range(4):
            optimizer.zero_grad()
            one_step(recorder, model, optimizer, torch.arange(2) + step)
            optimizer.zero_grad(set_to_none=step % 2 == 0)
            shares = one_step(recorder, model, optimizer, torch.arange(4), divide=2)
            shares |= one_step(recorder, model, optimizer, torch.arange(4, 8) + step, divide=2)
            before = model[0].weight.grad.clone()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            clip = float(model[0].weight.grad.flatten()[0] / before.flatten()[0])
            direct.update(optimizer, {each: [part * clip for part in row] for each, row in shares.items()})
            optimizer.step()
        finish(recorder, optimizer)
    assert clip < 0.9
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), direct.influence(query_mean(model)))
    steps = influence(tmp_path / "store", 'SELECT step, "update" FROM steps ORDER BY step')
    assert list(steps.values()) == [None, 1, 1, None, 2, 2, None, 3, 3, None, 4, 4]


def test_updates_that_are_not_recorded_move_the_weights_all_the_same(tmp_path: Path) -> None:
    model = network()
    direct, optimizer = Direct(model), sgd(model)
    inputs, targets = data()
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for step in range(9):
            optimizer.zero_grad()
            ids = torch.arange(4) + step % 8
            if step < 6:
                shares = one_step(recorder, model, optimizer, ids, every=3, keep=range(5))
            else:
                F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            recorded = step in (0, 3)
            kept = {each: row for each, row in shares.items() if each in range(5)}
            direct.update(optimizer, kept if recorded else {})
            optimizer.step()
        finish(recorder, optimizer)
    found = influence(tmp_path / "store", "SELECT * FROM hydra()")
    assert set(found) <= set(range(5))
    assert_equal(found, direct.influence(query_mean(model)))


def test_an_update_after_the_last_commit(tmp_path: Path) -> None:
    model = network()
    direct, optimizer = Direct(model), sgd(model)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        shares = one_step(recorder, model, optimizer, torch.arange(4))
        recorder.checkpoint(optimizer)
        direct.update(optimizer, shares)
        optimizer.step()
        finish(recorder, optimizer)
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), direct.influence(query_mean(model)))
    before = influence(tmp_path / "store", "SELECT step, weight FROM hydra_weights")
    assert list(before) == [1]


def test_weights_are_of_the_checkpoint_of_the_query_side(tmp_path: Path) -> None:
    model = network()
    direct, optimizer = Direct(model), sgd(model)
    expected = []
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for step in range(6):
            optimizer.zero_grad()
            shares = one_step(recorder, model, optimizer, torch.arange(4) + step)
            direct.update(optimizer, shares)
            optimizer.step()
            if step in (2, 5):
                finish(recorder, optimizer)
                expected.append(direct.influence(query_mean(model)))
    for number, each in enumerate(expected, start=1):
        assert_equal(influence(tmp_path / "store", f"SELECT * FROM hydra(checkpoint := {number})"), each)
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra(layers := '*')"), expected[-1])
    query = "SELECT * FROM hydra(query := 'SELECT * FROM validation WHERE sample_id = 1', checkpoint := 2)"
    single = gradients(model, torch.tensor([SAMPLES + 1]))[0]
    assert_equal(influence(tmp_path / "store", query), direct.influence(single))


def test_in_run_values(tmp_path: Path) -> None:
    model = network()
    optimizer = sgd(model)
    expected = torch.zeros(SAMPLES, dtype=torch.float64)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for step in range(5):
            query = mean(gradients(model, torch.arange(SAMPLES, SAMPLES + 3)))
            one_step(recorder, model, optimizer, torch.arange(SAMPLES, SAMPLES + 3), split="validation")
            optimizer.zero_grad()
            for sample, share in one_step(recorder, model, optimizer, torch.arange(4) + step).items():
                expected[sample] += 0.3 * sum((a * b).sum() for a, b in zip(share, query, strict=True))
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(influence(tmp_path / "store", "SELECT * FROM in_run()"), expected)


def test_tracin(tmp_path: Path) -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    inputs, targets = data()
    expected = torch.zeros(SAMPLES, dtype=torch.float64)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        for number in range(3):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.05 / (number + 1)
            recorder.checkpoint(optimizer)
            recorder.collect([(torch.arange(SAMPLES), (inputs[:SAMPLES], targets[:SAMPLES]))], "train")
            recorder.collect(validation(), "validation")
            query = query_mean(model)
            for sample, own in enumerate(gradients(model, torch.arange(SAMPLES))):
                product = sum((a * b).sum() for a, b in zip(own, query, strict=True))
                expected[sample] += 0.05 / (number + 1) * product
    assert_equal(influence(tmp_path / "store", "SELECT * FROM tracin()"), expected)


def recorded(path: Path, model: nn.Module, **options: Any) -> metaql.Recorder:
    return metaql.Recorder(model, path, dtype="float64", **options)


def test_parameters_that_the_optimizer_does_not_have_are_not_moved(tmp_path: Path) -> None:
    model = network()
    direct = Direct(model)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.3, momentum=0.9)
    with recorded(tmp_path / "store", model) as recorder:
        for step in range(4):
            model.zero_grad()
            direct.update(optimizer, one_step(recorder, model, optimizer, torch.arange(4) + step))
            optimizer.step()
        finish(recorder, optimizer)
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), direct.influence(query_mean(model)))


@pytest.mark.parametrize("layer", [0, 2])
def test_groups_of_which_some_are_not_recorded(layer: int, tmp_path: Path) -> None:
    model = network()
    direct = Direct(model)
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.01}, {"params": model[2].parameters(), "lr": 0.5}]
    )
    with recorded(tmp_path / "store", model, layers=[str(layer)]) as recorder:
        for step in range(4):
            optimizer.zero_grad()
            direct.update(optimizer, one_step(recorder, model, optimizer, torch.arange(4) + step))
            optimizer.step()
        finish(recorder, optimizer)
    query = [
        each if name.startswith(str(layer)) else each * 0
        for each, (name, _) in zip(query_mean(model), model.named_parameters(), strict=True)
    ]
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), direct.influence(query))


class Heads(nn.Module):
    """A body with two heads, of which a batch uses one or the other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.heads = nn.Linear(5, 4), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.used = 0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.heads[self.used](torch.tanh(self.body(x)))


def own_gradients(model: Heads, ids: Tensor) -> list[list[Tensor]]:
    inputs, targets = data()
    rows = []
    for each in ids.tolist():
        loss = F.cross_entropy(model(inputs[each : each + 1]), targets[each : each + 1])
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for p, g in zip(model.parameters(), found, strict=True)])
    return rows


@dataclass
class WithGradients:
    """The groups of an optimizer that an update changes."""

    param_groups: list[dict[str, Any]]


@pytest.mark.parametrize("accumulates", [False, True])
def test_groups_without_gradients_stay_as_they_are(accumulates: bool, tmp_path: Path) -> None:
    model = Heads()
    direct = Direct(model)
    inputs, targets = data()
    groups = [{"params": each.parameters()} for each in (model.body, *model.heads)]
    optimizer = torch.optim.SGD(groups, lr=0.3, momentum=0.9, weight_decay=0.1, nesterov=True)
    with recorded(tmp_path / "store", model) as recorder:
        for step in range(6):
            optimizer.zero_grad()
            shares: dict[int, list[Tensor]] = {}
            for used in (0, 1) if accumulates else (step % 2,):
                model.used = used
                ids = (torch.arange(4) + step + 4 * used) % SAMPLES
                rows = own_gradients(model, ids)
                shares |= {sample: [each / 4 for each in row] for sample, row in zip(ids.tolist(), rows, strict=True)}
                with recorder.step(ids, optimizer):
                    F.cross_entropy(model(inputs[ids]), targets[ids]).backward()
            there = [group for group in optimizer.param_groups if group["params"][0].grad is not None]
            direct.update(WithGradients(there), shares)
            optimizer.step()
        finish(recorder, optimizer)
    query = mean(own_gradients(model, torch.arange(SAMPLES, SAMPLES + 3)))
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), direct.influence(query))


def test_momentum_that_is_off_for_a_while(tmp_path: Path) -> None:
    model = network()
    direct, optimizer = Direct(model), sgd(model)
    with recorded(tmp_path / "store", model) as recorder:
        for step in range(9):
            optimizer.param_groups[0]["momentum"] = 0.0 if step in (3, 4) else 0.8
            optimizer.zero_grad()
            direct.update(optimizer, one_step(recorder, model, optimizer, (torch.arange(4) + step) % SAMPLES))
            optimizer.step()
        finish(recorder, optimizer)
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), direct.influence(query_mean(model)))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_loss(fused: bool, tmp_path: Path) -> None:
    model = network().float()
    inputs, targets = data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with metaql.Recorder(model, tmp_path / "store") as recorder:
        for step in range(2):
            optimizer.zero_grad()
            ids = torch.arange(4) + step
            with recorder.step(ids, optimizer):
                scaler.scale(F.cross_entropy(model(inputs[ids].float()), targets[ids])).backward()
            scaler.step(optimizer)
            scaler.update()
    steps = influence(tmp_path / "store", "SELECT step, gradient_factor FROM steps")
    assert steps == {1: pytest.approx(1.0), 2: pytest.approx(1.0)}


def _reused(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: metaql.Recorder) -> None:
    for _ in range(2):
        one_step(recorder, model, optimizer, torch.arange(4))
        optimizer.step()


def _twice(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: metaql.Recorder) -> None:
    one_step(recorder, model, optimizer, torch.arange(4))
    optimizer.step()
    optimizer.step()


def _in_turns(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: metaql.Recorder) -> None:
    other = sgd(model)
    for each in (optimizer, other, optimizer):
        model.zero_grad()
        one_step(recorder, model, each, torch.arange(4))
        each.step()


def _regrouped(model: nn.Module, optimizer: torch.optim.Optimizer, recorder: metaql.Recorder) -> None:
    for each in (optimizer, torch.optim.SGD(TWO_GROUPS(model), lr=0.1)):
        model.zero_grad()
        one_step(recorder, model, each, torch.arange(4))
        each.step()


@pytest.mark.parametrize(
    "loop, message",
    [
        (_reused, "used more than once"),
        (_twice, "used more than once"),
        (_in_turns, "taking turns"),
        (_regrouped, "parameter groups changed"),
    ],
)
def test_what_the_steps_do_not_tell_is_refused(loop: Callable[..., None], message: str, tmp_path: Path) -> None:
    model = network()
    optimizer = sgd(model)
    with recorded(tmp_path / "store", model) as recorder:
        loop(model, optimizer, recorder)
        finish(recorder, optimizer)
    with metaql.connect(tmp_path / "store") as db, pytest.raises(Exception, match=message):
        db.sql("SELECT * FROM hydra()").fetchall()


def test_sign_vectors_of_the_page(tmp_path: Path) -> None:
    direct, model = run(tmp_path / "store", TWO_GROUPS, steps=20, momentum=0.9)
    expected = torch.stack([direct.influence(each) for each in gradients(model, torch.arange(SAMPLES, SAMPLES + 3))])
    assert expected.sign().unique().tolist() == [-1, 1]
    page = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    (text,) = [each for each in re.findall(r"```sql\n(.*?)```", page, re.DOTALL) if "AS signs" in each]
    (code,) = [each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "KMeans" in each]
    names: dict[str, Any] = {"text": text}
    with metaql.connect(tmp_path / "store") as db:
        exec(code.replace("KMeans(10", "KMeans(2"), names | {"db": db}, names)
    assert names["ids"] == tuple(range(SAMPLES))
    assert torch.tensor(names["signs"]).tolist() == expected.sign().T.tolist()
    assert len(names["clusters"]) == SAMPLES


@pytest.mark.parametrize("warm", [False, True])
def test_a_pass_within_the_update_is_a_closure(warm: bool, tmp_path: Path) -> None:
    model = network()
    direct = Direct(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    with recorded(tmp_path / "store", model) as recorder:
        if warm:
            direct.update(optimizer, one_step(recorder, model, optimizer, torch.arange(4)))
            optimizer.step()
        for step in range(3):

            def closure(step: int = step) -> float:
                optimizer.zero_grad()
                direct.update(optimizer, one_step(recorder, model, optimizer, torch.arange(4) + step))
                return 0.0

            optimizer.step(closure)
        finish(recorder, optimizer)
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), direct.influence(query_mean(model)))


def test_a_batch_of_which_no_sample_is_kept(tmp_path: Path) -> None:
    model = network()
    direct, optimizer = Direct(model), sgd(model)
    with recorded(tmp_path / "store", model) as recorder:
        for first in (0, 1, 2, 3, 4):
            optimizer.zero_grad()
            shares = one_step(recorder, model, optimizer, torch.arange(4) + first, keep={3})
            direct.update(optimizer, {each: row for each, row in shares.items() if each == 3})
            optimizer.step()
        finish(recorder, optimizer)
    assert_equal(influence(tmp_path / "store", "SELECT * FROM hydra()"), direct.influence(query_mean(model)))


@pytest.mark.parametrize(
    "optimizer, change, message",
    [
        (lambda p: torch.optim.Adam(p, lr=0.1), None, "Adam"),
        (lambda p: torch.optim.SGD(p, lr=0.1), lambda m: m[0].weight.grad.clamp_(-1e-3, 1e-3), "common factor"),
    ],
)
def test_what_is_no_sum_of_gradients_is_refused(
    optimizer: Callable[..., Any], change: Callable[[nn.Module], Any] | None, message: str, tmp_path: Path
) -> None:
    model = network()
    made = optimizer(model.parameters())
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        one_step(recorder, model, made, torch.arange(4))
        if change is not None:
            change(model)
        made.step()
        finish(recorder, made)
    with metaql.connect(tmp_path / "store") as db, pytest.raises(Exception, match=message):
        db.sql("SELECT * FROM hydra()").fetchall()


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    model = network()
    optimizer = sgd(model)
    with metaql.Recorder(model, tmp_path / "store", dtype="float64") as recorder:
        recorder.checkpoint(optimizer)
        recorder.collect(validation(), "validation")
        one_step(recorder, model, optimizer, torch.arange(4))
    with metaql.connect(tmp_path / "store") as db:
        assert db.sql("SELECT count(*) FROM gradients WHERE step IS NOT NULL").fetchall() == [(4,)]
        with pytest.raises(Exception, match="not saved by a recorder that had recorded steps"):
            db.sql("SELECT * FROM hydra()").fetchall()
        with pytest.raises(QueryError, match="name of a split with steps; recorded are those of train"):
            db.sql("SELECT * FROM hydra(train := 'validation')")
        with pytest.raises(QueryError, match="name of a split with gradients"):
            db.sql("SELECT * FROM tracin()")
        with pytest.raises(QueryError, match="checkpoint"):
            db.sql("SELECT * FROM in_run(checkpoint := 1)")


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"every": 1.5}, {"keep": [1, 2]}, {"keep": torch.arange(3)}], ids=str
)
def test_what_every_and_keep_may_be(options: dict[str, Any], tmp_path: Path) -> None:
    model = network()
    with (
        metaql.Recorder(model, tmp_path / "store") as recorder,
        pytest.raises(RecordingError, match=r"from 1 on|Pass a set"),
    ):
        recorder.step(torch.arange(4), sgd(model), **options)


def test_the_pages_sql_runs_and_the_short_form_is_what_it_says(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    statements = [one for block in re.findall(r"```sql\n(.*?)```", text, re.DOTALL) for one in block.split(";")]
    model = network()
    inputs, targets = data()
    optimizer = sgd(model)
    with metaql.Recorder(model, tmp_path / "store") as recorder:
        for step in range(2):
            one_step(recorder, model, optimizer, torch.arange(SAMPLES, SAMPLES + 3), split="validation")
            optimizer.zero_grad()
            one_step(recorder, model, optimizer, torch.arange(4) + step)
            optimizer.step()
            optimizer.zero_grad()
            recorder.checkpoint(optimizer)
            train = [(torch.arange(SAMPLES), (inputs[:SAMPLES], targets[:SAMPLES]))]
            recorder.collect(train, "train", logits=True)
            recorder.curvature(train)
            recorder.collect([(torch.arange(3), (inputs[SAMPLES:], targets[SAMPLES:]))], "validation")
    with metaql.connect(tmp_path / "store") as db:
        answers = [db.sql(one).fetchall() for one in statements if one.strip()]
        assert all(answers)
        plain = dict(answers[2])
        assert answers[1] == [(each, pytest.approx(plain[each])) for each in sorted(plain, key=lambda one: plain[one])]
        for name in ("hydra", "tracin", "in_run"):
            assert db.sql(f"FROM {name}()").columns == ["sample_id", "influence"]


def test_steps_without_an_update_are_an_error() -> None:
    unused = Pass(1, "SGD", None, 0.1, 0.0, 0.0, 0.0, False, False, True, 0.5, None)
    with pytest.raises(QueryError, match=r"optimizer whose step\(\)"):
        require_updates([unused])
