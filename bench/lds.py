"""How well does summed influence foretell retraining? The linear datamodelling score (Park et al., TRAK, 2023).

A network is trained on random halves of the training set, several times each, and its losses on test samples are taken.
A method's influence of every training sample on every test sample's loss, of one network trained on all of them, is
added up over each half; the score is the rank correlation, over the halves, of these sums with the losses that came
out (which fall where influence is positive), its mean over the test samples. 1 is a perfect forecast, 0 none; the
noise of training sets a limit below 1, which is shown: the forecast of the losses by those of trainings with other
seeds. Trained for a short and for a longer time, since a gradient's inner product means less the nearer the network is
to a minimum. All methods are SQL over one recorded run. One thread. Exits with 1 when a promise is missed.

    python -m bench.lds
    python -m bench.lds --full                   # twice as many samples, halves and test samples
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from bench import data
from bench.rankings import spearman
from bench.recorded_training import Training, accuracy
from bench.report import Report, require, subplots, table

EKFAC, PLAIN = "EK-FAC, last checkpoint", "inner product, last checkpoint"
# (training sample, test sample, influence); positive helps.
METHODS = {
    PLAIN: "SELECT * FROM p2p()",
    "cosine similarity, last checkpoint": """
SELECT t.sample_id, v.sample_id, cosine_similarity(t.gradient, v.gradient) FROM train t, validation v""",
    "TracIn, all checkpoints": """
SELECT t.sample_id, v.sample_id, sum(c.learning_rate * inner_product(t.gradient, v.gradient))
FROM gradients t JOIN gradients v USING (checkpoint) JOIN checkpoints c USING (checkpoint)
WHERE t.split = 'train' AND v.split = 'validation' GROUP BY ALL""",
    "HYDRA": """
SELECT g.sample_id, v.sample_id, sum(w.weight * inner_product(g.gradient, v.gradient))
FROM gradients g JOIN hydra_weights w USING (step), validation v WHERE g.split = 'train' GROUP BY ALL""",
    EKFAC: """
SELECT t.sample_id, v.sample_id, inner_product(t.gradient, precondition(v.gradient, 'ekfac'))
FROM train t, validation v""",
    "K-FAC, last checkpoint": """
SELECT t.sample_id, v.sample_id, inner_product(t.gradient, precondition(v.gradient, 'kfac'))
FROM train t, validation v""",
    "diagonal Fisher, last checkpoint": """
SELECT t.sample_id, v.sample_id, inner_product(t.gradient, precondition(v.gradient, 'diagonal'))
FROM train t, validation v""",
}
RANDOM, LIMIT = "at random", "other seeds of the same halves"
COLUMNS = {"epochs": "epochs", "method": "method", "score": "score", "error": "standard error", "seconds": "query, s"}


@dataclass(frozen=True)
class Sizes:
    """``halves`` of ``samples``, each trained on ``seeds`` times."""

    samples: int
    tests: int
    halves: int
    seeds: int
    training: Training


def images(split: str, samples: int) -> tuple[Tensor, Tensor]:
    """Images of 14x14, [n, 196], and labels."""
    found, labels = data.fashion_mnist(split)
    return F.avg_pool2d(found[:samples], 2).flatten(1) - 0.3, labels[:samples]


def network(seed: int) -> nn.Module:
    """The same weights for the same seed."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(196, 32), nn.ReLU(), nn.Linear(32, 10))


def halves(sizes: Sizes) -> Tensor:
    """Which samples are in each half, bool [halves, samples]."""
    generator = torch.Generator().manual_seed(0)
    orders = torch.stack([torch.randperm(sizes.samples, generator=generator) for _ in range(sizes.halves)])
    return orders < sizes.samples // 2


def retrained(chosen: Tensor, sizes: Sizes) -> Tensor:
    """Test losses of networks that were trained on each half, [seeds, halves, tests]."""
    (inputs, labels), test = images("train", sizes.samples), images("test", sizes.tests)
    losses = torch.zeros(sizes.seeds, len(chosen), sizes.tests)
    for seed in range(sizes.seeds):
        for number, part in enumerate(chosen):
            # No two trainings share a seed, nor one with the network that is asked.
            own = 1 + seed * len(chosen) + number
            model = network(own)
            replace(sizes.training, seed=own).run(model, inputs[part], labels[part])
            with torch.no_grad():
                losses[seed, number] = F.cross_entropy(model(test[0]), test[1], reduction="none")
    return losses


def record(path: Path, sizes: Sizes) -> float:
    """Records the training on all samples, with four checkpoints, and the curvature; the test samples' accuracy."""
    (inputs, labels), test, model = images("train", sizes.samples), images("test", sizes.tests), network(0)
    with metaql.Recorder(model, path) as recorder:

        def after_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch % (sizes.training.epochs // 4) == 0:
                recorder.checkpoint(optimizer, epoch=epoch)
                recorder.collect(TensorDataset(inputs, labels), "train")
                recorder.collect(TensorDataset(*test), "validation")

        sizes.training.run(model, inputs, labels, recorder.step, after_epoch)
        recorder.curvature(TensorDataset(inputs, labels))
        recorder.curvature(TensorDataset(inputs, labels), "diagonal")
    return accuracy(model, *test)


def influences(db: metaql.Connection, text: str, sizes: Sizes) -> Tensor:
    """A method's answer, float64 [samples, tests]."""
    columns = db.sql(text).fetchnumpy()
    sample, test, score = (torch.from_numpy(each) for each in columns.values())
    require(len(score) == sizes.samples * sizes.tests, f"{len(score)} pairs are not all: {text}")
    found = torch.zeros(sizes.samples, sizes.tests, dtype=torch.float64)
    found[sample, test] = score.double()
    return found


def forecast(chosen: Tensor, influence: Tensor, losses: Tensor) -> tuple[float, float]:
    """The score and its standard error; ``losses`` [halves, tests]."""
    return mean_correlation(chosen.double() @ influence, -losses)


def mean_correlation(one: Tensor, other: Tensor) -> tuple[float, float]:
    """The mean over test samples of the correlation over the halves, [halves, tests] both; its error by jackknife."""
    count = len(one)
    without = torch.tensor([_mean(one[kept], other[kept]) for kept in ~torch.eye(count, dtype=torch.bool)])
    return _mean(one, other), float(((without - without.mean()).square().sum() * (count - 1) / count).sqrt())


def _mean(one: Tensor, other: Tensor) -> float:
    return float(spearman(one.T, other.T).mean())


def measure(report: Report, sizes: Sizes, folder: Path) -> None:
    """Adds the rows of one length of training."""
    epochs, chosen = sizes.training.epochs, halves(sizes)
    losses = retrained(chosen, sizes)
    reached = record(folder / f"{epochs}", sizes)
    print(f"test accuracy {reached:.3f}, mean loss after retraining {float(losses.mean()):.3f}", flush=True)
    mean = losses.mean(0)
    with metaql.connect(folder / f"{epochs}") as db:
        for method, text in METHODS.items():
            begin = time.perf_counter()
            influence = influences(db, text, sizes)
            seconds = time.perf_counter() - begin
            score, error = forecast(chosen, influence, mean)
            report.add(epochs=epochs, method=method, score=score, error=error, seconds=seconds, accuracy=reached)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(sizes.samples, sizes.tests, generator=generator, dtype=torch.float64)
    score, error = forecast(chosen, noise, mean)
    require(abs(score) <= 5 * error, f"random influence foretells retraining: {score:.3f} ± {error:.3f}")
    report.add(epochs=epochs, method=RANDOM, score=score, error=error)
    score, error = mean_correlation(losses[::2].mean(0), losses[1::2].mean(0))
    report.add(epochs=epochs, method=LIMIT, score=score, error=error)


def judge(report: Report) -> None:
    """The promises."""
    found = {(row["epochs"], row["method"]): row for row in report.rows}
    lengths = list(dict.fromkeys(row["epochs"] for row in report.rows))
    pairs = [(found[epochs, EKFAC]["score"], found[epochs, PLAIN]["score"]) for epochs in lengths]
    report.promise(
        "EK-FAC foretells retraining better than inner products at the same checkpoint",
        all(one > other for one, other in pairs),
        ", ".join(
            f"{epochs} epochs {one:.3f} and {other:.3f}" for epochs, (one, other) in zip(lengths, pairs, strict=True)
        ),
    )
    rows = [row for row in report.rows if row["method"] in METHODS]
    worst = min(rows, key=lambda row: row["score"] / row["error"])
    report.promise(
        "every method foretells better than chance, by three standard errors",
        worst["score"] > 3 * worst["error"],
        f"the least certain is {worst['method']} after {worst['epochs']} epochs, "
        f"{worst['score']:.3f} ± {worst['error']:.3f}",
    )


def plot(report: Report) -> Any:
    """The scores, by the length of training."""
    lengths = list(dict.fromkeys(row["epochs"] for row in report.rows))
    figure, axes = subplots(1, len(lengths), figsize=(5 * len(lengths), 4), sharey=True, squeeze=False)
    for axis, epochs in zip(axes[0], lengths, strict=True):
        rows = [row for row in report.rows if row["epochs"] == epochs]
        names, values, errors = ([row[key] for row in rows] for key in ("method", "score", "error"))
        axis.barh(names, values, xerr=[2 * each for each in errors])
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{epochs} epochs")
        axis.set_xlabel("linear datamodelling score")
    axes[0][0].invert_yaxis()
    return figure


def main() -> int:
    """Prints the table; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="twice as many samples, halves and test samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    times = 2 if options.full else 1
    report = Report("lds", "How well does summed influence foretell retraining?")
    for epochs in (20, 60):
        sizes = Sizes(500 * times, 100 * times, 100 * times, 4, Training(epochs, batch=32, rate=0.02))
        with tempfile.TemporaryDirectory() as folder:
            measure(report, sizes, Path(folder))
    judge(report)
    reached = " and ".join(f"{row['accuracy']:.2f}" for row in report.rows if row["method"] == PLAIN)
    report.remark(
        f"{sizes.samples} samples of Fashion-MNIST at 14x14, a network of 196, 32 ReLU and 10, SGD with momentum 0.9 "
        f"at {sizes.training.rate}; {sizes.halves} halves, {sizes.seeds} trainings each, {sizes.tests} test samples; "
        f"test accuracy {reached}. Four checkpoints. Dampings are those of precondition by default"
    )
    report.remark(
        f'"{LIMIT}": the mean losses of two trainings beside those of the other two. A forecast of the mean of all '
        "four can do better than that, for their mean is less noisy"
    )
    report.remark("The error is that of other halves (jackknife); test samples and the recorded run stay the same")
    return report.write([table(report.rows, COLUMNS)], plot(report))


if __name__ == "__main__":
    sys.exit(main())
