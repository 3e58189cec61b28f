"""`metaql demo`: a small training run with wrong labels in it, recorded and asked which samples hurt."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
from tqdm import tqdm

import metaql
from metaql.errors import MetaQLError

PATH = Path("runs/digits")
WRONG = 0.05
EPOCHS, BATCH, LEARNING_RATE, MOMENTUM = 6, 32, 0.07, 0.9

QUERY = """\
SELECT t.sample_id, t.label AS given_label, t.true_label,
       avg(inner_product(t.gradient, v.gradient)) AS influence
FROM train t, validation v
GROUP BY ALL
ORDER BY influence
LIMIT {limit}"""

LAYERS = """\
SELECT layer, layout, stored_bytes / 1e6 AS stored_mb, full_bytes * stored_rows / 1e6 AS full_mb FROM layers"""
SIZES = f"""\
SELECT layer, layout, round(stored_mb, 2) AS stored_mb, round(full_mb, 2) AS full_mb,
       round(full_mb / stored_mb, 1) AS times_smaller
FROM ({LAYERS} UNION ALL SELECT 'all', '', sum(stored_mb), sum(full_mb) FROM ({LAYERS}))"""


class Network(nn.Module):
    """Two convolutions and two linear layers for 8x8 pictures of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.fc1 = nn.Linear(1024, 64)
        self.fc2 = nn.Linear(64, 10)

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [n, 10] from pictures [n, 1, 8, 8]."""
        maps = F.relu(self.conv2(F.relu(self.conv1(pictures))))
        logits: Tensor = self.fc2(F.relu(self.fc1(maps.flatten(1))))
        return logits


@dataclass(frozen=True)
class Digits:
    """scikit-learn's handwritten digits, split; ``given`` are the training labels, some of them wrong."""

    train: Tensor
    given: Tensor
    true: Tensor
    validation: TensorDataset

    @property
    def wrong(self) -> int:
        """How many training labels are wrong."""
        return int((self.given != self.true).sum())


def main(path: Path | None, seed: int) -> None:
    """Trains, records, asks and prints; the store stays at ``path``, by default ``runs/digits``, made anew."""
    if path is not None and path.exists():
        raise MetaQLError(f"{path} exists. Give the demo another path, or none: it uses {PATH} again and again.")
    began = time.perf_counter()
    torch.manual_seed(seed)
    digits = load(seed)
    count = len(digits.train)
    print(f"{count} handwritten digits to train on; the labels of {digits.wrong} are made wrong (seed {seed}).\n")
    where = record(digits, path)
    with metaql.connect(where) as db:
        answer(db, digits)
    print(f"\nAll of this took {time.perf_counter() - began:.0f} seconds. The store is {where}; ask it yourself:\n")
    command = sys.argv[0] if Path(sys.argv[0]).name == "metaql" else "metaql"
    print(f'  {command} sql {where} "SELECT label, count(*), avg(loss) FROM train GROUP BY label ORDER BY label"')
    print(f"  {command} info {where}")


def load(seed: int) -> Digits:
    """The digits, of which 5 % of the training labels are replaced by other ones."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MetaQLError("The demo needs scikit-learn for its data: pip install 'metaql[demo]'.") from error
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    train, validation = order[:1437], order[1437:]
    wrong = torch.randperm(len(train), generator=generator)[: round(WRONG * len(train))]
    given = labels[train].clone()
    given[wrong] = (given[wrong] + torch.randint(1, 10, wrong.shape, generator=generator)) % 10
    return Digits(pictures[train], given, labels[train], TensorDataset(pictures[validation], labels[validation]))


def record(digits: Digits, path: Path | None) -> Path:
    """Trains a network with a recorder beside the loop; returns where the store is."""
    where = PATH if path is None else path
    model = Network()
    with metaql.Recorder(model, where, overwrite=path is None) as recorder:
        optimizer = train(model, digits)
        recorder.checkpoint(optimizer, epoch=EPOCHS)
        samples = TensorDataset(digits.train, digits.given)
        names = {"sample_id": torch.arange(len(samples)).numpy(), "true_label": digits.true.numpy()}
        recorder.collect(samples, split="train", metadata=names)
        recorder.collect(digits.validation, split="validation")
    return where


def train(model: Network, digits: Digits) -> torch.optim.Optimizer:
    """Plain SGD with momentum and a learning rate that falls to zero."""
    batches = -(-len(digits.train) // BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=EPOCHS * batches)
    with tqdm(total=EPOCHS * batches, desc="train", unit="step", disable=None) as progress:
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(digits.train)).split(BATCH):
                optimizer.zero_grad()
                F.cross_entropy(model(digits.train[rows]), digits.given[rows]).backward()
                optimizer.step()
                schedule.step()
                progress.update()
    return optimizer


def answer(db: Any, digits: Digits) -> None:
    """Prints the query, its answer, how good it is, and what the store takes."""
    print("Which training samples hurt the validation set most?\n")
    query = QUERY.format(limit=10)
    print(query)
    db.sql(query).show()
    k, count = digits.wrong, len(digits.train)
    hits = sum(given != true for _, given, true, _ in db.sql(QUERY.format(limit=k)).fetchall())
    print(
        f"Among the first {k} of {count} there are {hits} of the {k} wrong labels: {hits / k:.0%}, where chance would "
        f"find {k / count:.0%}.\n"
    )
    print("What the gradients take in the store, against full ones (MB):\n")
    db.sql(SIZES).show()
