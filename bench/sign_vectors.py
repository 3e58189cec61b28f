"""Do training samples of a class contribute to the same test samples? Clusters by HYDRA's contributions.

A sample's contribution to each test sample's loss, over the whole training, is a vector as long as there are test
samples. Training samples are clustered by these vectors' signs (as Chen et al. 2021 do), by the vectors themselves and
by those of length 1, by the contributions to the mean loss of each class, and, to compare with, by their inputs and the
logits: k-means, with as many clusters as there are classes. How well the clusters agree with the classes says what a
vector knows of them: the adjusted Rand index (0 at random, 1 the same), normalised mutual information, and purity, the
share of samples whose class is the commonest in their cluster. One thread. Exits with 1 when a promise is missed.

    python -m bench.sign_vectors
    python -m bench.sign_vectors --full          # twice as many samples
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from bench import data
from bench.recorded_training import Training, accuracy
from bench.report import Report, require, subplots, table

SIGNS, RAW, RANDOM = "signs of contributions", "contributions", "at random"
INPUTS, LOGITS = "inputs", "logits"
# Far more than chance makes of hundreds of samples.
CHANCE = 0.05
# As in docs/methods.md.
CONTRIBUTIONS = """
WITH pairs AS (
  SELECT g.sample_id, v.sample_id AS test_id, sum(w.weight * inner_product(g.gradient, v.gradient)) AS contribution
  FROM gradients g JOIN hydra_weights w USING (step), validation v WHERE g.split = 'train' GROUP BY ALL)
SELECT sample_id, list(contribution ORDER BY test_id) FROM pairs GROUP BY sample_id ORDER BY sample_id
"""
BY_CLASS = """
WITH means AS (SELECT label, avg(gradient) AS mean FROM validation GROUP BY label), pairs AS (
  SELECT g.sample_id, m.label, sum(w.weight * inner_product(g.gradient, m.mean)) AS contribution
  FROM gradients g JOIN hydra_weights w USING (step), means m WHERE g.split = 'train' GROUP BY ALL)
SELECT sample_id, list(contribution ORDER BY label) FROM pairs GROUP BY sample_id ORDER BY sample_id
"""
LOGITS_OF = """
SELECT sample_id, logits FROM outputs WHERE split = 'train' AND checkpoint IS NOT NULL ORDER BY sample_id"""
COLUMNS = {
    "epochs": "epochs",
    "by": "clusters by",
    "width": "numbers",
    "rand": "adjusted Rand index",
    "information": "mutual information",
    "purity": "purity",
}


def record(path: Path, inputs: Tensor, labels: Tensor, test: tuple[Tensor, Tensor], epochs: int) -> float:
    """Records a training of a network of 196, 32 ReLU and 10; the test samples' accuracy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(inputs.shape[1], 32), nn.ReLU(), nn.Linear(32, 10))
    with metaql.Recorder(model, path) as recorder:
        recorder.checkpoint(Training(epochs, batch=32, rate=0.02).run(model, inputs, labels, recorder.step))
        recorder.collect(TensorDataset(inputs, labels), "train", logits=True)
        recorder.collect(TensorDataset(*test), "validation")
    return accuracy(model, *test)


def vectors(db: metaql.Connection, text: str, samples: int) -> Tensor:
    """A query's list for each sample, float64 [samples, width]."""
    rows = db.sql(text).fetchall()
    require([sample for sample, _ in rows] == list(range(samples)), "not every sample has a vector")
    return torch.tensor([numbers for _, numbers in rows], dtype=torch.float64)


def purity(clusters: np.ndarray, labels: np.ndarray) -> float:
    """The share of samples whose class is the commonest one in their cluster."""
    most = [np.bincount(labels[clusters == each]).max() for each in np.unique(clusters)]
    return float(sum(most) / len(labels))


def clustered(points: Tensor) -> np.ndarray:
    """Each sample's cluster of ten."""
    found: np.ndarray = KMeans(10, n_init=10, random_state=0).fit_predict(points.numpy())
    return found


def measure(report: Report, folder: Path, samples: int, tests: int, epochs: int) -> None:
    """Adds a row for each kind of vector, of one length of training."""
    (inputs, labels), test = images("train", samples), images("test", tests)
    reached = record(folder, inputs, labels, test, epochs)
    print(f"test accuracy {reached:.3f}", flush=True)
    with metaql.connect(folder) as db:
        each, by_class, logits = (vectors(db, text, samples) for text in (CONTRIBUTIONS, BY_CLASS, LOGITS_OF))
    kinds = {
        SIGNS: each.sign(),
        RAW: each,
        "contributions of length 1": F.normalize(each),
        "signs of contributions to classes": by_class.sign(),
        "contributions to classes": by_class,
        "contributions to classes, of length 1": F.normalize(by_class),
        LOGITS: logits,
        INPUTS: inputs.double(),
    }
    found = {name: clustered(points) for name, points in kinds.items()}
    found[RANDOM] = np.random.default_rng(0).integers(10, size=samples)
    for name, clusters in found.items():
        report.add(
            epochs=epochs,
            by=name,
            width=kinds[name].shape[1] if name in kinds else None,
            rand=float(adjusted_rand_score(labels.numpy(), clusters)),
            information=float(normalized_mutual_info_score(labels.numpy(), clusters)),
            purity=purity(clusters, labels.numpy()),
            accuracy=reached,
        )


def images(split: str, samples: int) -> tuple[Tensor, Tensor]:
    """Images of 14x14, [n, 196], and labels."""
    found, labels = data.fashion_mnist(split)
    return F.avg_pool2d(found[:samples], 2).flatten(1) - 0.3, labels[:samples]


def judge(report: Report) -> None:
    """The promises."""
    found = {(row["epochs"], row["by"]): row["rand"] for row in report.rows}
    lengths = list(dict.fromkeys(epochs for epochs, _ in found))
    for other in (RAW, INPUTS, LOGITS):
        report.promise(
            f"clusters by the signs of contributions agree better with the classes than those by {other}",
            all(found[epochs, SIGNS] > found[epochs, other] for epochs in lengths),
            ", ".join(
                f"{epochs} epochs {found[epochs, SIGNS]:.3f} and {found[epochs, other]:.3f}" for epochs in lengths
            ),
        )
    chance = max(abs(found[epochs, RANDOM]) for epochs in lengths)
    require(chance < CHANCE, f"random clusters agree with the classes: {chance:.3f}")


def plot(report: Report) -> Any:
    """The adjusted Rand index, by the length of training."""
    lengths = list(dict.fromkeys(row["epochs"] for row in report.rows))
    names = list(dict.fromkeys(row["by"] for row in report.rows))
    figure, axis = subplots(figsize=(8, 5))
    for number, epochs in enumerate(lengths):
        values = [row["rand"] for row in report.rows if row["epochs"] == epochs]
        places = [place + 0.27 * (number - 1) for place in range(len(names))]
        axis.barh(places, values, height=0.27, label=f"{epochs} epochs")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlabel("adjusted Rand index with the classes")
    axis.legend()
    return figure


def main() -> int:
    """Prints the table; 0 when the promises are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="twice as many samples")
    options = parser.parse_args()
    torch.set_num_threads(1)
    samples, tests = (2000, 400) if options.full else (1000, 200)
    report = Report("sign_vectors", "Do training samples of a class contribute to the same test samples?")
    for epochs in (2, 10, 40):
        with tempfile.TemporaryDirectory() as folder:
            measure(report, Path(folder), samples, tests, epochs)
    judge(report)
    reached = ", ".join(f"{row['accuracy']:.2f}" for row in report.rows if row["by"] == SIGNS)
    report.remark(
        f"{samples} samples of Fashion-MNIST at 14x14, {tests} test samples, a network of 196, 32 ReLU and 10, SGD "
        f"with momentum 0.9 at 0.02 in batches of 32; test accuracy {reached}. k-means of ten clusters, the best of "
        "ten starts"
    )
    report.remark(
        "A contribution is a sum of products with the sample's own gradients, which hold its label; logits and inputs "
        "hold it as far as the network, or the image, shows it"
    )
    return report.write([table(report.rows, COLUMNS)], plot(report))


if __name__ == "__main__":
    sys.exit(main())
