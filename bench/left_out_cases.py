"""Trainings, what really happens without some samples, and what methods foretell: a part of ``bench.left_out``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from bench.hessian_aware import Differentiable, derivatives, retrained
from bench.hydra_truth import OF_PAIRS, small, small_network
from bench.left_out_truth import Optimum
from bench.recorded_training import Training
from bench.report import require

HYDRA, EXACT, EKFAC = "HYDRA", "HYDRA with the Hessian", "EK-FAC"
CG, LISSA = "conjugate gradients", "LiSSA"
TRACIN, IN_RUN, INNER = "TracIn, 4 checkpoints", "in-run", "inner product, last checkpoint"
BY_DEFAULT = "EK-FAC, damping by default"
CURVATURES = {EKFAC: "ekfac", "K-FAC": "kfac", "diagonal Fisher": "diagonal"}
SOLVERS = {CG: "cg", LISSA: "lissa", "Arnoldi": "arnoldi"}
# (training sample, test sample, influence); positive helps.
ALONG = {
    HYDRA: OF_PAIRS,
    TRACIN: """
SELECT t.sample_id, v.sample_id, sum(c.learning_rate * inner_product(t.gradient, v.gradient))
FROM gradients t JOIN gradients v USING (checkpoint) JOIN checkpoints c USING (checkpoint)
WHERE t.split = 'train' AND v.split = 'validation' GROUP BY ALL""",
    IN_RUN: """
SELECT t.sample_id, v.sample_id, sum(s.learning_rate * s.sample_factor * inner_product(t.gradient, v.gradient))
FROM gradients t JOIN steps s USING (step), gradients v JOIN steps w USING (step)
WHERE t.split = 'train' AND v.split = 'validation' AND s.updates = w.updates GROUP BY ALL""",
}
PAIRS = "SELECT t.sample_id, v.sample_id, inner_product(t.gradient, {}) FROM train t, validation v"
# One vector instead of one for each test sample, where it takes seconds.
MEAN = """
SELECT t.sample_id, 0, avg(inner_product(t.gradient, {})) FROM train t, validation v GROUP BY t.sample_id"""
# More than the negative curvature of any batch, in the networks here.
OUTWEIGHS = 0.4
# A method's influence of every sample, float64 [samples, tests] or [samples, 1] of the mean, and its query's seconds.
Forecasts = dict[str, tuple[Tensor, float | None]]


@dataclass(frozen=True)
class Case:
    """A training; ``losses`` has the test samples' [models, tests] where its samples have shares [models, samples]."""

    name: str
    labels: Tensor
    losses: Callable[[Tensor], Tensor]
    forecasts: Forecasts

    def changes(self, left_out: Tensor) -> Tensor:
        """What leaving out each set, bool [sets, samples], does to the test losses, [sets, tests]."""
        before = self.losses(torch.ones(1, len(self.labels), dtype=torch.float64))
        return self.losses((~left_out).double()) - before


def trained(folder: Path, samples: int, tests: int, epochs: int) -> Case:
    """A network that is trained by SGD for a number of epochs, a multiple of 4."""
    (inputs, labels), test = small("train", samples), small("test", tests)
    training, model = Training(epochs, batch=30, rate=0.01), small_network()
    record(folder, training, model, (inputs, labels), test)
    own = Differentiable(model)

    def losses(shares: Tensor) -> Tensor:
        weights = retrained(small_network(), training, inputs, labels, shares)
        return torch.stack([own.losses(each, *test) for each in weights])

    # How far a gradient that stays the same moves the weights, by one sample's part in it.
    reach = training.rate * epochs / (training.batch * (1 - training.momentum))
    scales = {HYDRA: 1.0, TRACIN: reach / training.rate / 4, IN_RUN: 1 / (1 - training.momentum), INNER: reach}
    texts = ALONG | {INNER: PAIRS.format("v.gradient")} | preconditioned(1 / (samples * reach), OUTWEIGHS)
    forecasts = asked(folder, model, samples, {name: (text, scales.get(name)) for name, text in texts.items()})
    query = own.gradients(own.weights(), *test)
    forecasts[EXACT] = -derivatives(small_network(), training, inputs, labels) @ query.T, None
    return Case(f"{epochs} epochs", labels, losses, forecasts)


def record(
    path: Path, training: Training, model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> None:
    """Trains the model and records every step, with the test samples beside it, four checkpoints and the curvature."""
    with metaql.Recorder(model, path, dtype="float64", inputs=True) as recorder:

        def step(ids: Tensor, optimizer: torch.optim.Optimizer) -> Any:
            with recorder.step(torch.arange(len(test[1])), optimizer, split="validation"):
                F.cross_entropy(model(test[0]), test[1]).backward()
            optimizer.zero_grad()
            return recorder.step(ids, optimizer)

        def after_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch % (training.epochs // 4) == 0:
                recorder.checkpoint(optimizer, epoch=epoch)
                recorder.collect(TensorDataset(*train), "train")
                recorder.collect(TensorDataset(*test), "validation")

        training.run(model, *train, step, after_epoch)
        recorder.curvature(TensorDataset(*train))
        recorder.curvature(TensorDataset(*train), "diagonal")


def at_optimum(folder: Path, samples: int, tests: int, penalty: float) -> Case:
    """Logistic regression that is trained to the end, with an L2 penalty."""
    (inputs, labels), (test_inputs, test_labels) = small("train", samples), small("test", tests)
    inputs, test_inputs = (torch.cat([each, torch.ones_like(each[:, :1])], 1) for each in (inputs, test_inputs))
    optimum = Optimum(inputs, labels, 10, penalty)

    def losses(shares: Tensor) -> Tensor:
        weights = optimum.weights(shares)
        return torch.stack([F.cross_entropy(test_inputs @ each.T, test_labels, reduction="none") for each in weights])

    model = nn.Linear(inputs.shape[1], 10, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(optimum.weights(torch.ones(1, samples, dtype=torch.float64))[0])
    with metaql.Recorder(model, folder, dtype="float64", inputs=True) as recorder:
        recorder.checkpoint()
        recorder.collect(TensorDataset(inputs, labels), "train")
        recorder.collect(TensorDataset(test_inputs, test_labels), "validation")
        recorder.curvature(TensorDataset(inputs, labels))
        recorder.curvature(TensorDataset(inputs, labels), "diagonal")
    texts: dict[str, tuple[str, float | None]] = {INNER: (PAIRS.format("v.gradient"), 1 / (penalty * samples))}
    texts |= {name: (text, None) for name, text in preconditioned(penalty, penalty).items()}
    case = Case(f"optimum, penalty {penalty}", labels, losses, asked(folder, model, samples, texts))
    require_derivative(case)
    return case


def require_derivative(case: Case) -> None:
    """Conjugate gradients at the optimum are the derivative by the weights of samples, here of the five that matter."""
    foretold, less = case.forecasts[CG][0].mean(1), 1e-4
    chosen = foretold.abs().argsort()[-5:]
    shares = torch.ones(1 + len(chosen), len(foretold), dtype=torch.float64)
    shares[1 + torch.arange(len(chosen)), chosen] -= less
    losses = case.losses(shares).mean(1)
    error = float(((losses[1:] - losses[0]) / less / foretold[chosen] - 1).abs().max())
    require(error < 1e-3, f"the derivative at the optimum is not what conjugate gradients say, by {error:.2g}")


def preconditioned(damping: float, of_solvers: float) -> dict[str, str]:
    """The queries of influence functions."""
    call = "precondition(v.gradient, '{}', damping := {})"
    ways = {name: PAIRS.format(call.format(method, damping)) for name, method in CURVATURES.items()}
    solved = {
        name: (MEAN if name == LISSA else PAIRS).format(call.format(method, of_solvers))
        for name, method in SOLVERS.items()
    }
    return {BY_DEFAULT: PAIRS.format("precondition(v.gradient, 'ekfac')")} | ways | solved


def asked(path: Path, model: nn.Module, samples: int, texts: dict[str, tuple[str, float | None]]) -> Forecasts:
    """The answers, each times its scale; None is that of influence functions, one over the number of samples."""
    forecasts: Forecasts = {}
    with metaql.connect(path, model=model) as db:
        for method, (text, scale) in texts.items():
            begin = time.perf_counter()
            columns = db.sql(text).fetchnumpy()
            seconds = time.perf_counter() - begin
            sample, test, score = (torch.from_numpy(each) for each in columns.values())
            found = torch.full((samples, int(test.max()) + 1), torch.nan, dtype=torch.float64)
            found[sample, test] = score * (1 / samples if scale is None else scale)
            require(not bool(found.isnan().any()), f"not all pairs have an answer: {text}")
            forecasts[method] = found, seconds
    return forecasts
