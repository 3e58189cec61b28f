"""A step of ELITE against the same by plain autograd, one sample at a time, and what labelled rows cost."""

import pytest
import torch
from torch import nn

from metaql.methods.elite.meta_gradients import trainable
from metaql.methods.elite.objectives import DeepSAD, Elite, Supervised, Unsupervised, shuffled
from metaql.methods.elite.steps import FactoredSteps, Labels, UnfactoredSteps, left_to_learn, steps_for
from metaql.methods.rows import in_parts

MARGIN = 1.5


def length(module, rows):
    return module(rows).flatten(1).square().sum(1).sqrt()


def some_labels(*shape):
    return Labels.of(
        torch.randn(5, *shape, dtype=torch.float64), torch.tensor([True, False, False, True, False]), MARGIN
    )


def of_size_one(products, loss):
    return products / products.abs().mean()


def loss_of_each(labels, scores):
    """Eq. 4, row by row."""
    losses = [
        max(MARGIN - each, 0 * each) if bad else each for each, bad in zip(scores, labels.is_anomaly, strict=True)
    ]
    normals = [each for each, bad in zip(losses, labels.is_anomaly, strict=True) if not bad]
    anomalies = [each for each, bad in zip(losses, labels.is_anomaly, strict=True) if bad]
    return (sum(normals) / len(normals) + sum(anomalies) / len(anomalies)) / 2


def networks():
    plain = nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False))
    convolved = nn.Sequential(
        nn.Conv1d(2, 3, 3, bias=False), nn.GroupNorm(1, 3), nn.ELU(), nn.Flatten(), nn.Linear(9, 2)
    )
    mixing = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3, bias=False))
    return {"mlp": (plain, (4,)), "conv": (convolved, (2, 5)), "batch norm": (mixing, (4,))}


@pytest.mark.parametrize("name", ["mlp", "conv", "batch norm"])
def test_a_step_is_what_autograd_makes_of_it(name):
    torch.manual_seed(0)
    module, shape = networks()[name]
    module.double().train()
    parameters = trainable(module)
    labels, batch = some_labels(*shape), torch.randn(7, *shape, dtype=torch.float64)

    loss = loss_of_each(labels, length(module, labels.rows))
    direction = torch.autograd.grad(loss, list(parameters.values()))
    scores = length(module, batch)
    products = []
    for score in scores:
        own = torch.autograd.grad(score, list(parameters.values()), retain_graph=True)
        products.append(sum((a * b).sum() for a, b in zip(own, direction, strict=True)))
    weights = torch.stack(products) / torch.stack(products).abs().mean()
    pushed = sum(w * score for w, score in zip(weights, scores, strict=True) if w > 0 or score < MARGIN) / len(batch)
    expected = torch.autograd.grad(
        pushed + loss_of_each(labels, length(module, labels.rows)), list(parameters.values())
    )

    steps = steps_for(module, length, batch)
    assert isinstance(steps, UnfactoredSteps if name == "batch norm" else FactoredSteps)
    step = steps.step(batch, labels, of_size_one)
    assert step.validation_loss == pytest.approx(loss.item())
    for found, other in zip((step.gradient[each] for each in parameters), expected, strict=True):
        torch.testing.assert_close(found, other)


def test_factors_and_forward_mode_make_the_same_step():
    torch.manual_seed(0)
    module, shape = networks()["conv"]
    module.double()
    labels, batch = some_labels(*shape), torch.randn(7, *shape, dtype=torch.float64)
    one, two = (kind(module, length).step(batch, labels, of_size_one) for kind in (FactoredSteps, UnfactoredSteps))
    torch.testing.assert_close(one.gradient, two.gradient)
    direction = {name: torch.randn_like(each) for name, each in trainable(module).items()}
    a, b = (kind(module, length).products(batch, direction) for kind in (FactoredSteps, UnfactoredSteps))
    torch.testing.assert_close(a, b)


def test_slopes_are_those_of_the_loss():
    labels = some_labels(2)
    scores = torch.tensor([0.5, 0.2, 3.0, 2.5, 1.0], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(labels.loss(scores), loss_of_each(labels, scores))
    expected = torch.autograd.grad(labels.loss(scores), scores)[0]
    torch.testing.assert_close(labels.slopes(scores.detach()), expected)


@pytest.mark.parametrize("anomalies, expected", [(50, (10, 10)), (4, (16, 4)), (97, (3, 17))])
def test_many_labelled_rows_are_drawn_of_both_classes(anomalies, expected):
    labels = Labels.of(torch.randn(100, 2), torch.arange(100) < anomalies, MARGIN).drawn(20)
    assert (int((~labels.is_anomaly).sum()), int(labels.is_anomaly.sum())) == expected
    assert float(labels.shares.sum()) == pytest.approx(0, abs=1e-6)


def test_the_other_objectives():
    torch.manual_seed(0)
    module, shape = networks()["mlp"]
    module.double()
    parameters = trainable(module)
    rows, labels = torch.randn(8, *shape, dtype=torch.float64), some_labels(*shape)
    places = torch.arange(3, 8)

    def gradients(total):
        return dict(zip(parameters, torch.autograd.grad(total, list(parameters.values())), strict=True))

    scores, known = length(module, rows), length(module, labels.rows)
    torch.testing.assert_close(Unsupervised(module, length, rows).step(places)[0], gradients(scores[places].mean()))
    supervised = Supervised(module, length, rows, labels).step(places)[0]
    torch.testing.assert_close(supervised, gradients(loss_of_each(labels, known)))
    known = length(module, labels.rows)
    sad = sum(1 / each**2 if bad else each**2 for each, bad in zip(known, labels.is_anomaly, strict=True))
    both = (length(module, rows)[places].square().mean() * 8 + sad) / 13
    torch.testing.assert_close(
        DeepSAD(module, length, rows, labels).step(places)[0], gradients(both), rtol=1e-5, atol=1e-5
    )


def test_settled_rows_skip_and_are_asked_again():
    torch.manual_seed(0)
    module, shape = networks()["mlp"]
    module.double()
    elite = Elite(module, length, torch.randn(40, *shape, dtype=torch.float64), some_labels(*shape), settled=1)
    skipped = []
    for epoch in range(1, 6):
        batches = elite.batches(8, epoch)
        assert torch.cat(batches).sort().values.equal(torch.arange(40))
        told = [elite.step(batch) for batch in batches]
        skipped.append(elite.summary(epoch, []).settled)
        assert any(loss is None for _, loss in told) == (skipped[-1] > 0)
    assert skipped[0] == 0
    assert max(skipped[1:4]) > 0.5
    assert skipped[4] == 0


def test_a_settled_batch_steps_along_its_weights_and_the_last_direction():
    torch.manual_seed(0)
    module, shape = networks()["mlp"]
    module.double()
    parameters = trainable(module)
    rows = torch.randn(8, *shape, dtype=torch.float64)
    elite = Elite(module, length, rows, some_labels(*shape), settled=1)
    elite.step(torch.arange(8))
    elite.summary(1, [])
    direction, weights = elite._direction, elite.weights().clone()
    elite.batches(8, 1)
    elite._skips[:] = True
    gradient, loss = elite.step(torch.arange(8))
    assert loss is None
    scores = length(module, rows)
    pushed = (weights * ((weights > 0) | (scores.detach() < MARGIN)) * scores).mean()
    own = torch.autograd.grad(pushed, list(parameters.values()))
    for found, (name, expected) in zip(own, direction.items(), strict=True):
        torch.testing.assert_close(gradient[name], found + expected)


def test_batches_are_of_like_size():
    assert sorted(map(len, shuffled(torch.arange(10), 4))) == [3, 3, 4]
    assert shuffled(torch.arange(0), 4) == []


def test_parts_are_put_together():
    rows = torch.randn(2500, 1)
    assert torch.equal(in_parts(lambda part: part[:, 0] * 2, rows), rows[:, 0] * 2)


class Gated(nn.Module):
    """Rows of one sign pass a layer of their own, as long as there are some of either."""

    def __init__(self):
        super().__init__()
        self.some, self.all = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, rows):
        chosen = torch.nonzero(rows[:, 0] > 0).flatten()
        return self.all(rows).index_add(0, chosen, self.some(rows[chosen]))


def test_rows_that_have_no_factors_after_others_had():
    torch.manual_seed(0)
    module = Gated().double()
    some, others = (torch.randn(7, 4, dtype=torch.float64) for _ in range(2))
    some[:, 0], labels = 1.0, some_labels(4)
    steps = steps_for(module, length, some)
    assert isinstance(steps, FactoredSteps)
    one, two = (each.step(others, labels, of_size_one) for each in (steps, UnfactoredSteps(module, length)))
    torch.testing.assert_close(one.gradient, two.gradient)
    torch.testing.assert_close(
        steps.products(others, one.direction), UnfactoredSteps(module, length).products(others, one.direction)
    )


def test_scores_below_zero_leave_something_to_learn():
    known, others = torch.tensor([-4.0, -2.0]), torch.tensor([-6.0, 3.0])
    assert left_to_learn(-3.0, known, others) == 0
    assert left_to_learn(0.5, known.abs(), others.abs()) == 0.5
