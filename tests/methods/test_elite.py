"""ELITE's training from Python: what comes out, what is refused, and that it can be repeated."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from metaql.errors import QueryError
from metaql.methods import elite
from metaql.methods.elite import Fitted, Settings, fit

FAST = Settings(epochs=2, batch_size=16)


def some_rows(n, shape=(4,), seed=0):
    """Rows [n, *shape] of which every third is an anomaly, and which."""
    generator = torch.Generator().manual_seed(seed)
    is_anomaly = torch.arange(n) % 3 == 0
    rows = torch.randn(n, *shape, generator=generator)
    rows[is_anomaly] += 2
    return rows, is_anomaly


@pytest.mark.parametrize("shape", [(1,), (4,), (2, 11), (9, 8), (1, 5, 6)])
@pytest.mark.parametrize("detector", ["svdd", "autoencoder", "deepsad", "supervised"])
def test_results_by_detector_and_shape(detector, shape):
    rows, _ = some_rows(40, shape)
    fitted = fit(rows, *some_rows(6, shape, 1), Settings(detector=detector, epochs=1))
    assert fitted.anomaly_score.shape == (40,)
    assert fitted.anomaly_score.dtype == torch.float32
    assert fitted.pseudo_label.dtype == torch.bool
    if fitted.weight is None:
        assert torch.equal(fitted.pseudo_label, fitted.meta_gradient > 0)
    else:
        assert torch.equal(fitted.pseudo_label, fitted.weight < 0)
    assert torch.equal(fitted.score(rows), fitted.anomaly_score)
    assert (fitted.weight is None) == (detector in ("deepsad", "supervised"))
    assert len(fitted.embedding(rows)) == 40


def test_the_same_seed_gives_the_same_and_leaves_random_numbers_alone():
    rows, _ = some_rows(50)
    before = torch.random.get_rng_state()
    one, two, other = (fit(rows, *some_rows(6), Settings(epochs=2, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one.anomaly_score, two.anomaly_score)
    assert torch.equal(one.meta_gradient, two.meta_gradient)
    assert not torch.equal(one.anomaly_score, other.anomaly_score)


def test_without_labels_there_are_only_scores():
    fitted = fit(some_rows(30)[0], settings=FAST)
    assert fitted.pseudo_label is fitted.meta_gradient is fitted.weight is None
    assert fitted.history[-1].validation_loss is None


@pytest.mark.parametrize("detector", ["svdd", "autoencoder"])
def test_saved_and_restored(detector):
    rows, _ = some_rows(30, (2, 9))
    fitted = fit(rows, *some_rows(6, (2, 9)), Settings(detector=detector, epochs=1))
    tensors, description = fitted.saved()
    again = Fitted.restored(tensors, description)
    assert torch.equal(again.score(rows), fitted.anomaly_score)
    assert again.settings == fitted.settings
    assert again.history == fitted.history
    assert torch.equal(again.meta_gradient, fitted.meta_gradient)


@pytest.mark.parametrize(
    "rows, labelled, is_anomaly, message",
    [
        (torch.randn(1, 3), None, None, "2 rows or more"),
        (torch.randn(5), None, None, "must be rows"),
        (torch.randn(5, 3), torch.randn(2, 4), torch.tensor([True, False]), "labelled rows have shape"),
        (torch.randn(5, 3), torch.randn(2, 3), torch.tensor([True, True]), "all 2 labelled rows are anomalies"),
        (torch.randn(5, 3), torch.randn(2, 3), torch.tensor([False, False]), "all 2 labelled rows are normal"),
        (torch.randn(5, 3), torch.randn(2, 3), torch.tensor([True]), "one value for each labelled row"),
        (torch.tensor([[1.0], [float("nan")]]), None, None, "1 of 2 rows of features contain NaN or infinity.*row 1"),
    ],
)
def test_rows_that_are_refused(rows, labelled, is_anomaly, message):
    with pytest.raises(QueryError, match=message):
        fit(rows, labelled, is_anomaly, FAST)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"detector": "isolation"}, "there is no detector 'isolation', only svdd"),
        ({"network": "resnet"}, "there is no network 'resnet', only mlp"),
        ({"network": "conv2d"}, r"takes images .* shape \[4\]"),
        ({"detector": "deepsad"}, "learns from labels"),
        ({"epochs": 0}, "epochs must be a whole number from 1 on, not 0"),
        ({"batch_size": None}, "batch_size must be"),
        ({"learning_rate": float("nan")}, "learning_rate must be"),
        ({"seed": -1}, "seed must be"),
        ({"settled": 1.5}, "settled must be"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(QueryError, match=message):
        fit(some_rows(10)[0], settings=Settings(**settings))


def test_names_that_are_taken():
    for register, name in ((elite.register_network, "mlp"), (elite.register_detector, "svdd")):
        with pytest.raises(QueryError, match="there already"):
            register(name, *[torch.nn.Linear] * (1 if name == "mlp" else 2))


class Recurrent(torch.nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.recurrent = torch.nn.LSTM(shape[1], 4, batch_first=True)

    def forward(self, rows):
        return self.recurrent(rows)[0][:, -1]


def batch_normed(shape):
    return torch.nn.Sequential(torch.nn.Linear(shape[0], 6), torch.nn.BatchNorm1d(6), torch.nn.Tanh())


@pytest.mark.parametrize("build, shape", [(Recurrent, (5, 3)), (batch_normed, (4,))])
def test_networks_of_ones_own_are_trained(build, shape):
    elite.register_network("own", build)
    rows, _ = some_rows(40, shape)
    fitted = fit(rows, *some_rows(8, shape), Settings(network="own", epochs=2, batch_size=16))
    again = Fitted.restored(*fitted.saved())
    assert torch.equal(again.score(rows), fitted.anomaly_score)
    assert fitted.meta_gradient.isfinite().all()


def test_a_detector_of_ones_own():
    def score(module, rows):
        return module(rows).square().sum(1)

    elite.register_detector("own", lambda shape: torch.nn.Linear(shape[0], 3), score)
    rows, _ = some_rows(40)
    fitted = fit(rows, *some_rows(8), Settings(detector="own", epochs=1))
    assert fitted.embedding(rows).shape == (40, 4)
    with pytest.raises(QueryError, match="brings a network of its own"):
        fit(rows, settings=Settings(detector="own", network="mlp"))


def linear(shape):
    return torch.nn.Linear(shape[0], 3)


@pytest.mark.parametrize(
    "build, score, message",
    [
        (linear, lambda module, rows: module(rows), r"must score rows .* shape \[2, 3\]"),
        (linear, lambda module, rows: module(rows).sum(), r"must score rows .* shape \[\]"),
        (linear, lambda module, rows: module(rows).sum(1).long(), "torch.int64"),
        (linear, lambda module, rows: module(rows).sum(1).tolist(), "for 2 rows it returned list"),
        (linear, lambda module, rows: module(rows).sum(1).detach(), "has nothing to learn"),
        (lambda shape: torch.nn.Flatten(), lambda module, rows: module(rows).sum(1), "has nothing to learn"),
        (lambda shape: torch.sum, lambda module, rows: rows.sum(1), "must be built as a torch.nn.Module, not as"),
    ],
)
def test_detectors_that_can_t_be(build, score, message):
    elite.register_detector("own", build, score)
    with pytest.raises(QueryError, match=message):
        fit(some_rows(40)[0], settings=Settings("own"))


def test_a_detector_of_another_precision():
    elite.register_detector(
        "own", lambda shape: linear(shape).double(), lambda module, rows: module(rows.double()).square().sum(1)
    )
    fitted = fit(some_rows(40)[0], *some_rows(8), Settings("own", epochs=1))
    assert fitted.meta_gradient.dtype == torch.float32


def test_what_progress_raises_ends_the_training():
    told = []

    def stop(progress):
        told.append(progress)
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(some_rows(40)[0], *some_rows(8), Settings(epochs=3, batch_size=20), stop)
    assert [(each.epoch, each.batch, each.batches) for each in told] == [(1, 1, 2), (1, 2, 2), (2, 1, 2)]


def test_labels_beat_pollution():
    """A third of the rows is anomalous, and a plain detector learns that they are normal."""
    rows, is_anomaly = some_rows(300, (6,))
    labelled, known = some_rows(18, (6,), 1)
    found = fit(rows, labelled, known, Settings(epochs=40)).anomaly_score
    plain = fit(rows, settings=Settings(epochs=40)).anomaly_score

    def auc(scores):
        return float((scores[is_anomaly][:, None] > scores[~is_anomaly]).float().mean())

    assert auc(found) > 0.9 > auc(plain)


@pytest.mark.parametrize("offset", [0, -50])
def test_scores_may_be_negative(offset):
    """As log-likelihoods are; what counts is which is larger."""

    class Gauss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.log_deviation = (torch.nn.Parameter(torch.zeros(4)) for _ in range(2))

    def score(module, rows):
        normal = torch.distributions.Normal(module.mean, module.log_deviation.exp())
        return offset - normal.log_prob(rows).sum(1)

    elite.register_detector("own", lambda shape: Gauss(), score)
    rows, is_anomaly = some_rows(200)
    labelled = some_rows(20, seed=1)
    fitted = fit(rows + 3 * is_anomaly[:, None], labelled[0] + 3 * labelled[1][:, None], labelled[1], Settings("own"))
    assert float((fitted.pseudo_label == is_anomaly).float().mean()) > 0.8


def test_a_score_that_is_zero_for_all():
    elite.register_detector(
        "own", lambda shape: torch.nn.Linear(4, 3), lambda module, rows: torch.relu(module(rows).sum(1) - 1e6)
    )
    assert not fit(some_rows(40)[0], *some_rows(8), Settings("own", epochs=1)).weight.any()


def test_threads_take_turns_with_random_numbers():
    rows, settings = some_rows(50)[0], Settings(epochs=20, batch_size=16)
    expected = fit(rows, *some_rows(6), settings).anomaly_score
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: fit(rows, *some_rows(6), settings).anomaly_score, range(3)))
    assert all(torch.equal(each, expected) for each in found)
