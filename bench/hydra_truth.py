"""How near HYDRA is to the truth: a part of ``bench.hydra``.

The paper leaves the Hessian out. Here is a small network in float64 whose Hessian-vector products are exact, and the
exact recurrence is compared with retraining, a sample weighing more or less.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from bench import data
from bench.hessian_aware import Differentiable, derivatives, retrained
from bench.rankings import spearman
from bench.recorded_training import Training, accuracy
from bench.report import Report, require

OF_PAIRS = """
SELECT g.sample_id, v.sample_id, sum(w.weight * inner_product(g.gradient, v.gradient))
FROM gradients g JOIN hydra_weights w USING (step), validation v WHERE g.split = 'train' GROUP BY ALL
"""
TRUTH = {
    "epochs": "epochs",
    "loss": "training loss",
    "accuracy": "test accuracy",
    "spearman": "Spearman, mean test loss",
    "disagreement": "signs that differ",
    "pair_spearman": "Spearman, each test sample (median)",
    "pair_disagreement": "signs that differ",
    "retrained": "exact beside retraining, relative",
}


def small(split: str, samples: int) -> tuple[Tensor, Tensor]:
    """Images of 7x7, [n, 49], and labels."""
    images, labels = data.fashion_mnist(split)
    return F.avg_pool2d(images[:samples], 4).flatten(1).double() - 0.3, labels[:samples]


def small_network() -> nn.Module:
    """Smooth, so that it can be differentiated twice everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(49, 16), nn.Tanh(), nn.Linear(16, 10)).double()


def truth(report: Report, folder: Path, samples: int, tests: int, epochs: list[int]) -> None:
    """Adds a row for each number of epochs: Hessian-free beside Hessian-aware, and this beside retraining."""
    (inputs, labels), (test_inputs, test_labels) = small("train", samples), small("test", tests)
    for number in epochs:
        training, model = Training(number, batch=30, rate=0.01), small_network()
        with metaql.Recorder(model, folder / f"truth {number}", dtype="float64") as recorder:
            recorder.checkpoint(training.run(model, inputs, labels, recorder.step))
            recorder.collect(TensorDataset(test_inputs, test_labels), "validation")
        with metaql.connect(folder / f"truth {number}") as db:
            pairs = db.sql(OF_PAIRS).fetchall()
        free = torch.zeros(tests, samples, dtype=torch.float64)
        places = torch.tensor([(query, sample) for sample, query, _ in pairs])
        free[places[:, 0], places[:, 1]] = torch.tensor([score for *_, score in pairs], dtype=torch.float64)
        query = Differentiable(model).gradients(Differentiable(model).weights(), test_inputs, test_labels)
        direct = -query @ derivatives(small_network(), training, inputs, labels, with_hessian=False).T
        require(bool((free - direct).abs().max() <= 1e-9 * direct.abs().max()), "hydra() is not Algorithm 1")
        exact = -query @ derivatives(small_network(), training, inputs, labels).T
        error = beside_retraining(training, exact.mean(0), inputs, labels, test_inputs, test_labels)
        require(error < 1e-6, f"the exact recurrence is off by {error} from retraining")
        report.add(
            section="truth",
            epochs=number,
            loss=float(F.cross_entropy(model(inputs), labels).detach()),
            accuracy=accuracy(model, test_inputs, test_labels),
            spearman=float(spearman(free.mean(0), exact.mean(0))),
            disagreement=disagreement(free.mean(0), exact.mean(0)),
            pair_spearman=float(spearman(free, exact).median()),
            pair_disagreement=disagreement(free, exact),
            retrained=error,
        )


def disagreement(one: Tensor, other: Tensor) -> float:
    """The share of signs that differ."""
    return float((one.sign() != other.sign()).double().mean())


def beside_retraining(training: Training, exact: Tensor, inputs: Tensor, labels: Tensor, *test: Tensor) -> float:
    """The largest relative difference of three samples' influence from what retraining with them weighted shows."""
    more, chosen = 1e-4, exact.abs().argsort()[-3:]
    shares = torch.ones(2, 3, len(labels), dtype=torch.float64)
    shares[:, torch.arange(3), chosen] += torch.tensor([[more], [-more]])
    weights = retrained(small_network(), training, inputs, labels, shares.flatten(0, 1))
    losses = torch.stack([Differentiable(small_network()).losses(each, *test).mean() for each in weights])
    heavier, lighter = losses.reshape(2, 3)
    return float(((lighter - heavier) / (2 * more) / exact[chosen] - 1).abs().max())
