"""Finding wrong labels along training: a part of ``bench.hydra``.

LeNet-5 on Fashion-MNIST, of which a share of the labels were moved to another class. The training samples are ranked
by how likely their label is wrong: by harm to clean test samples (HYDRA, TracIn, the last checkpoint's influence), by
the norm of their own gradient, and by their loss. Precision is of as many samples as there are wrong labels.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import TensorDataset

import metaql
from bench import data
from bench.mislabelled import flipped
from bench.rankings import auc, precision
from bench.recorded_training import Training, accuracy, by_sample, lenet
from bench.report import Report

QUERIES = 500
HYDRA = "HYDRA"
RANKINGS = {
    HYDRA: "SELECT sample_id, -influence FROM hydra()",
    "HYDRA, on its label's class": """
WITH means AS (SELECT label, avg(gradient) AS mean FROM validation GROUP BY label)
SELECT g.sample_id, -sum(w.weight * inner_product(g.gradient, m.mean))
FROM gradients g JOIN hydra_weights w USING (step)
JOIN train t ON t.sample_id = g.sample_id JOIN means m ON m.label = t.label
WHERE g.split = 'train' AND g.step IS NOT NULL GROUP BY g.sample_id""",
    "TracIn, 4 checkpoints": "SELECT sample_id, -influence FROM tracin()",
    "influence, last checkpoint": "SELECT sample_id, -influence FROM p2b()",
    "self-influence, last checkpoint": "SELECT sample_id, norm(gradient) ** 2 FROM train",
    "self-influence, 4 checkpoints": """
SELECT sample_id, avg(norm(gradient) ** 2) FROM gradients
WHERE split = 'train' AND checkpoint IS NOT NULL GROUP BY sample_id""",
    "loss, last checkpoint": "SELECT sample_id, loss FROM train",
    "loss, average of 4 checkpoints": """
SELECT sample_id, avg(loss) FROM outputs WHERE split = 'train' AND checkpoint IS NOT NULL GROUP BY sample_id""",
    "at random": "SELECT sample_id, hash(sample_id) % 1_000_003 FROM train",
}
COLUMNS = {
    "share": "wrong",
    "accuracy": "test accuracy",
    "ranking": "ranking",
    "precision": "precision",
    "auc": "AUC",
}


def measure(report: Report, share: float, samples: int, epochs: int) -> None:
    """Adds a row for each ranking, of one training with this share of wrong labels; epochs are a multiple of 4."""
    images, clean = (each[:samples] for each in data.fashion_mnist("train"))
    test_images, test_labels = data.fashion_mnist("test")
    torch.manual_seed(0)
    labels = flipped(clean, share)
    wrong, model = labels != clean, lenet()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store"
        with metaql.Recorder(model, path) as recorder:

            def after_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
                if epoch % (epochs // 4) == 0:
                    recorder.checkpoint(optimizer, epoch=epoch)
                    recorder.collect(TensorDataset(images, labels), "train")
                    recorder.collect(TensorDataset(test_images[:QUERIES], test_labels[:QUERIES]), "validation")

            training = Training(epochs, batch=32, rate=0.02)
            training.run(model, images, labels, recorder.step, after_epoch)
        held_back = slice(QUERIES, QUERIES + 3000)
        reached = accuracy(model, test_images[held_back], test_labels[held_back])
        with metaql.connect(path) as db:
            for ranking, text in RANKINGS.items():
                found = by_sample(db.sql(text).fetchall(), samples)
                report.add(
                    section="labels",
                    share=f"{share:.0%}",
                    accuracy=reached,
                    ranking=ranking,
                    precision=precision(found, wrong),
                    auc=auc(found, wrong),
                )


def judge(report: Report, rows: list[dict[str, Any]]) -> None:
    """The promises."""
    of_hydra = {row["share"]: row["auc"] for row in rows if row["ranking"] == HYDRA}
    best = {
        share: max((row for row in rows if row["share"] == share), key=lambda row: row["auc"]) for share in of_hydra
    }
    report.promise(
        "HYDRA finds wrong labels with an AUC of at least 0.8, whatever their share",
        all(each >= 0.8 for each in of_hydra.values()),
        ", ".join(
            f"{share} wrong {each:.3f} (best: {best[share]['ranking']}, {best[share]['auc']:.3f})"
            for share, each in of_hydra.items()
        ),
    )


def draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """AUC by the share of wrong labels."""
    shares = list(dict.fromkeys(row["share"] for row in rows))
    for ranking in RANKINGS:
        own = [row["auc"] for row in rows if row["ranking"] == ranking]
        style = "o-" if ranking.startswith("HYDRA") else "k:" if ranking == "at random" else ".--"
        axes.plot(shares, own, style, label=ranking)
    axes.set(xlabel="wrong labels", ylabel="AUC")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
