"""A round of LANCET from Python: what comes out, what is refused, and that it can be repeated."""

import pytest
import torch

from metaql.errors import QueryError
from metaql.methods import lancet
from metaql.methods.lancet import Fitted, Settings, fit
from metaql.methods.lancet.fitted import fresh_module
from metaql.methods.lancet.training import Training

FAST = Settings(budget=4, epochs=2)


def some_rows(n, shape=(4,), classes=2, seed=0):
    """Rows [n, *shape] in ``classes`` clouds, in turn, and their labels, of which every fifth is known."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(n) % classes
    middles = 3 * torch.randn(classes, *shape, generator=generator)
    rows = middles[truth] + torch.randn(n, *shape, generator=generator)
    return rows, torch.where(torch.arange(n) % 5 == 0, truth, -1), truth


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 11), (9, 8), (3, 5, 6)])
@pytest.mark.parametrize("embedding", ["semigan", "supervised", "ready"])
def test_results_by_embedding_and_shape(embedding, shape):
    rows, labels, _ = some_rows(40, shape)
    fitted = fit(rows, labels, 2, Settings(budget=4, embedding=embedding, epochs=1))
    known = labels >= 0
    assert torch.equal(fitted.label[known], labels[known])
    assert fitted.label.min() >= 0
    assert fitted.probability.dtype == torch.float32
    assert torch.equal(fitted.weight.isnan(), known)
    assert float(fitted.weight[~known].mean()) == pytest.approx(1, abs=1e-5)
    assert len(set(fitted.ask.tolist())) == 4
    assert not known[fitted.ask].any()
    label, probability = fitted.predict(rows)
    assert torch.equal(label[~known], fitted.label[~known])
    torch.testing.assert_close(probability[~known], fitted.probability[~known])
    assert fitted.embedding(rows).shape[0] == 40


@pytest.mark.parametrize("embedding", ["semigan", "supervised", "ready"])
def test_few_labels_spread_over_clouds_that_lie_apart(embedding):
    rows, labels, truth = some_rows(200, classes=3)
    labels[20:] = -1
    fitted = fit(rows, labels, 3, Settings(embedding=embedding, epochs=100))
    assert (fitted.label == truth).float().mean() > 0.9


def test_the_same_seed_gives_the_same_and_leaves_random_numbers_alone():
    rows, labels, _ = some_rows(50)
    before = torch.random.get_rng_state()
    one, two, other = (fit(rows, labels, 2, Settings(epochs=2, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    for name in ("label", "probability", "ask"):
        assert torch.equal(getattr(one, name), getattr(two, name))
    assert torch.equal(one.weight.nan_to_num(), two.weight.nan_to_num())
    assert not torch.equal(one.probability, other.probability)


def test_what_progress_raises_ends_the_round_and_leaves_random_numbers_alone():
    rows, labels, _ = some_rows(50)
    seen = []

    def interrupt(progress):
        seen.append(progress)
        raise KeyboardInterrupt

    before = torch.random.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        fit(rows, labels, 2, FAST, progress=interrupt)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (seen[0].epoch, seen[0].epochs, seen[0].batch, seen[0].batches) == (1, 2, 1, 1)


@pytest.mark.parametrize("embedding", ["semigan", "supervised", "ready"])
def test_without_labels_rows_to_ask_for_are_spread(embedding):
    rows, labels, truth = some_rows(60, classes=3)
    fitted = fit(rows, torch.full_like(labels, -1), 3, Settings(budget=3, embedding=embedding, epochs=1))
    assert fitted.label.eq(-1).all()
    assert fitted.probability.isnan().all()
    assert fitted.weight.isnan().all()
    assert not fitted.stop.now
    assert sorted(truth[fitted.ask].tolist()) == [0, 1, 2]
    with pytest.raises(QueryError, match="label the rows it asks for first"):
        fitted.predict(rows)


def test_with_all_labels_nothing_is_asked():
    rows, _, truth = some_rows(30)
    fitted = fit(rows, truth, 2, FAST)
    assert fitted.stop.now
    assert len(fitted.ask) == 0
    assert torch.equal(fitted.label, truth)


def test_labels_of_one_class_and_classes_without():
    rows, labels, _ = some_rows(30)
    fitted = fit(rows, torch.where(labels == 1, 7, -1), 10, FAST)
    assert fitted.label.eq(7).all()
    assert fitted.classes.tolist() == [7]


def test_one_label_for_each_of_a_hundred_classes():
    rows, _, truth = some_rows(300, (20,), classes=100)
    labels = torch.where(torch.arange(300) < 100, truth, -1)
    fitted = fit(rows, labels, 100, Settings(embedding="supervised", epochs=100))
    assert fitted.classes.tolist() == list(range(100))
    assert (fitted.label == truth)[100:].float().mean() > 0.5


def test_fewer_rows_than_a_batch_constant_columns_and_a_budget_beyond_them():
    rows, labels, _ = some_rows(3)
    rows[:, 0] = 5.0
    fitted = fit(rows, labels, 2, Settings(budget=100, epochs=1))
    assert sorted(fitted.ask.tolist()) == [1, 2]
    assert fitted.weight[1:].isfinite().all()


def test_labels_that_nobody_is_sure_of_do_not_count():
    rows, labels, _ = some_rows(40)
    sure = torch.ones(40)
    sure[:20] = 0
    other = labels.clone()
    other[:20] = torch.where(labels[:20] >= 0, 1 - labels[:20], -1)
    settings = Settings(embedding="supervised", epochs=5)
    one, two = (Training(fresh_module(settings, (4,), 2), rows, each, sure, settings, None) for each in (labels, other))
    for each in (one, two):
        torch.manual_seed(0)
        each.run()
    assert one.history == two.history


@pytest.mark.parametrize("embedding", ["semigan", "ready"])
def test_saved_and_restored(embedding):
    rows, labels, _ = some_rows(30, (2, 9))
    fitted = fit(rows, labels, 2, Settings(embedding=embedding, epochs=1))
    again = Fitted.restored(*fitted.saved())
    assert torch.equal(again.predict(rows)[1], fitted.predict(rows)[1])
    assert torch.equal(again.embedding(rows), fitted.embedding(rows))
    assert torch.equal(again.ask, fitted.ask)
    assert (again.settings, again.history, again.stop) == (fitted.settings, fitted.history, fitted.stop)


def test_a_network_of_ones_own():
    lancet.register_network("lancet test line", lambda shape: torch.nn.Linear(shape[0], 3))
    rows, labels, _ = some_rows(30)
    settings = Settings(network="lancet test line", epochs=1)
    fitted = fit(rows, labels, 2, settings)
    assert fitted.embedding(rows).shape == (30, 3)
    lancet.register_network("lancet test line", lambda shape: torch.nn.Linear(shape[0], 5))
    with pytest.raises(QueryError, match="register the one it was trained with"):
        Fitted.restored(*fitted.saved())
    lancet.register_network("lancet test line", lambda _: torch.nn.Flatten(0))
    with pytest.raises(QueryError, match=r"must map rows \[n, …\] to points"):
        fit(rows, labels, 2, settings)
    with pytest.raises(QueryError, match="there already"):
        lancet.register_network("mlp", torch.nn.Linear)


ROWS, UNKNOWN = torch.randn(5, 3), torch.full((5,), -1)


@pytest.mark.parametrize(
    "rows, labels, classes, confidence, message",
    [
        (torch.randn(1, 3), torch.tensor([0]), 2, None, "2 rows or more"),
        (torch.randn(5), UNKNOWN, 2, None, "must be rows"),
        (torch.tensor([[1.0], [float("nan")]]), torch.tensor([0, -1]), 2, None, "contain NaN or infinity.*row 1"),
        (ROWS, torch.tensor([0]), 2, None, "one value for each of 5 rows"),
        (ROWS, UNKNOWN.float(), 2, None, "must be whole numbers, -1 where unknown"),
        (ROWS, UNKNOWN + 3, 2, None, "from 0 to 1, or -1 where unknown; row 0 has 2"),
        (ROWS, UNKNOWN - 1, 2, None, "row 0 has -2"),
        (ROWS, UNKNOWN, 0, None, "classes must be a whole number"),
        (ROWS, UNKNOWN + 1, 2, torch.ones(3), "confidence must have one value"),
        (ROWS, UNKNOWN + 1, 2, torch.full((5,), 1.5), "number from 0 to 1"),
        (ROWS, UNKNOWN + 1, 2, torch.full((5,), float("nan")), "number from 0 to 1"),
        (ROWS, UNKNOWN + 1, 2, torch.zeros(5), "all labelled rows is 0"),
    ],
)
def test_rows_and_labels_that_are_refused(rows, labels, classes, confidence, message):
    with pytest.raises(QueryError, match=message):
        fit(rows, labels, classes, FAST, confidence)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"budget": 0}, "budget must be a whole number from 1 on, not 0"),
        ({"embedding": "vae"}, "there is no embedding 'vae', only semigan"),
        ({"embedding": "ready", "network": "mlp"}, "leave out network"),
        ({"network": "resnet"}, "there is no network 'resnet', only mlp"),
        ({"network": "conv2d"}, r"takes images .* shape \[4\]"),
        ({"epochs": 0}, "epochs must be a whole number from 1 on, not 0"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_settings_that_are_refused(settings, message):
    rows, labels, _ = some_rows(10)
    with pytest.raises(QueryError, match=message):
        fit(rows, labels, 2, Settings(**settings))
