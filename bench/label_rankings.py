"""A recorded training on labels of which some are wrong, and SQL that ranks its samples by how likely theirs is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import metaql
from bench.recorded_training import Training, by_sample

# Of the in-run values: so many query samples are recorded, at one update in so many.
ASKED, EVERY = 32, 4
_CLASSES = "WITH means AS (SELECT label, avg(gradient) AS mean FROM validation GROUP BY label)"
_PROBABILITIES = """
WITH powers AS (
  SELECT sample_id, checkpoint, label, list_transform(logits, lambda x: exp(x - list_max(logits))) AS e
  FROM outputs JOIN samples USING (sample_id, split) WHERE split = 'train' AND checkpoint IS NOT NULL),
distances AS (
  SELECT sample_id, checkpoint,
    sqrt(list_sum(list_transform(e, lambda x, i: (x / list_sum(e) - (i - 1 = label)::INT) ** 2))) AS el2n FROM powers)
"""
HYDRA, HYDRA_OF_CLASS = "HYDRA", "HYDRA, on its label's class"
AVERAGE_LOSS = "loss, average of all epochs"
RANDOM = "at random"
# (sample, suspicion): the largest are the likeliest to be wrong.
BY_GRADIENT = {
    HYDRA: "SELECT sample_id, -influence FROM hydra()",
    HYDRA_OF_CLASS: f"""{_CLASSES}
SELECT g.sample_id, -sum(w.weight * inner_product(g.gradient, m.mean))
FROM gradients g JOIN hydra_weights w USING (step)
JOIN train t ON t.sample_id = g.sample_id JOIN means m ON m.label = t.label
WHERE g.split = 'train' AND g.step IS NOT NULL GROUP BY g.sample_id""",
    "in-run values": "SELECT sample_id, -influence FROM in_run()",
    "TracIn": "SELECT sample_id, -influence FROM tracin()",
    "influence": "SELECT sample_id, -influence FROM p2b()",
    "influence, on its label's class": f"""{_CLASSES}
SELECT t.sample_id, -inner_product(t.gradient, m.mean) FROM train t JOIN means m USING (label)""",
    "EK-FAC influence": """
WITH query AS (SELECT avg(gradient) AS mean FROM validation)
SELECT t.sample_id, -inner_product(t.gradient, precondition(q.mean, 'ekfac')) FROM train t, query q""",
    "EK-FAC influence, on its label's class": f"""{_CLASSES}
SELECT t.sample_id, -inner_product(t.gradient, precondition(m.mean, 'ekfac'))
FROM train t JOIN means m USING (label)""",
    "cosine similarity": """
WITH query AS (SELECT avg(gradient) AS mean FROM validation)
SELECT t.sample_id, -cosine_similarity(t.gradient, q.mean) FROM train t, query q""",
    "cosine similarity, with its label's class": f"""{_CLASSES}
SELECT t.sample_id, -cosine_similarity(t.gradient, m.mean) FROM train t JOIN means m USING (label)""",
    "self-influence (GraNd)": "SELECT sample_id, norm(gradient) FROM train",
    "GraNd, first epoch": """
SELECT sample_id, norm(gradient) FROM gradients WHERE split = 'train' AND checkpoint = 1""",
    "GraNd, average of all epochs": """
SELECT sample_id, avg(norm(gradient)) FROM gradients
WHERE split = 'train' AND checkpoint IS NOT NULL GROUP BY sample_id""",
}
BY_OUTPUT = {
    "EL2N, first epoch": f"{_PROBABILITIES} SELECT sample_id, el2n FROM distances WHERE checkpoint = 1",
    "EL2N, average of all epochs": f"{_PROBABILITIES} SELECT sample_id, avg(el2n) FROM distances GROUP BY sample_id",
    # What was never learnt counts as forgotten without end, as in the paper.
    "forgetting events": """
WITH seen AS (
  SELECT o.sample_id, o.checkpoint, o.prediction = s.label AS is_right
  FROM outputs o JOIN samples s USING (sample_id, split) WHERE split = 'train' AND checkpoint IS NOT NULL),
turns AS (
  SELECT *, NOT is_right AND lag(is_right) OVER (PARTITION BY sample_id ORDER BY checkpoint) AS forgotten FROM seen)
SELECT sample_id, CASE WHEN bool_or(is_right) THEN count(*) FILTER (WHERE forgotten) ELSE 1_000_000 END
FROM turns GROUP BY sample_id""",
    "loss": "SELECT sample_id, loss FROM train",
    AVERAGE_LOSS: """
SELECT sample_id, avg(loss) FROM outputs WHERE split = 'train' AND checkpoint IS NOT NULL GROUP BY sample_id""",
    RANDOM: "SELECT sample_id, hash(sample_id) % 1_000_003 FROM train",
}
RANKINGS = {**BY_GRADIENT, **BY_OUTPUT}


def record(
    path: Path,
    model: nn.Module,
    splits: dict[str, tuple[Tensor, Tensor]],
    training: Training,
    in_run: bool = False,
    dtype: str = "float32",
) -> None:
    """Trains on ``train`` and records every step, all splits after every epoch, and the curvature at the end.

    With ``in_run``, some of ``validation`` at some steps as well.
    """
    generator, (queries, answers) = torch.Generator().manual_seed(training.seed), splits["validation"]
    updates = itertools.count()
    with metaql.Recorder(model, path, dtype=dtype) as recorder:

        @contextmanager
        def step(ids: Tensor, optimizer: torch.optim.Optimizer) -> Iterator[None]:
            if in_run and next(updates) % EVERY == 0:
                asked = torch.randperm(len(answers), generator=generator)[:ASKED]
                batch, targets = queries[asked], answers[asked]
                with recorder.step(asked, optimizer, split="validation"):
                    F.cross_entropy(model(batch), targets).backward()
                optimizer.zero_grad()
            with recorder.step(ids, optimizer):
                yield

        def after_epoch(epoch: int, optimizer: torch.optim.Optimizer) -> None:
            recorder.checkpoint(optimizer, epoch=epoch)
            for split, samples in splits.items():
                recorder.collect(TensorDataset(*samples), split, logits=split == "train")

        training.run(model, *splits["train"], step, after_epoch)
        recorder.curvature(TensorDataset(*splits["train"]))


def suspicions(path: Path, rankings: dict[str, str], samples: int) -> dict[str, Tensor]:
    """Each ranking's scores by sample, float64 [samples]."""
    with metaql.connect(path) as db:
        return {name: by_sample(db.sql(text).fetchall(), samples) for name, text in rankings.items()}
