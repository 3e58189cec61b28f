"""Many ways to say the same thing: each must give the same rows, and most must cost little.

A file of ``spellings/`` is one question. Its first line says which columns it asks for, and ``QUESTIONS`` holds what
is right, from plain numpy. Under ``==== CHEAP`` stand the texts that may multiply and add up about as many references
as there are rows, and not one for each pair; under ``==== NOT YET`` those that will one day; under ``==== ANY COST``
those that need only be right. A text has a title, perhaps a line ``-- with`` and its parameters, and statements, of
which the last is the question.

METAQL_SPELLINGS=report prints what each text takes, whatever is expected of it.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import metaql
from metaql.connection import Connection
from tests.queries.compare import Rows, differences
from tests.queries.counting import Work, counted
from tests.queries.stores import Collected, PlainStore, Recipe, record

N, M = 60, 40
CHEAP, NOT_YET, ANY_COST = "CHEAP", "NOT YET", "ANY COST"
# So many times the rows of both sides may be multiplied or added up, for each vector that an answer needs of a side.
FACTOR = 3
REPORTING = os.environ.get("METAQL_SPELLINGS") == "report"

# Known to the texts by its name here.
wanted = pd.DataFrame({"label": [1]})


@dataclass(frozen=True)
class Spelling:
    """One text of a question."""

    question: str
    kind: str
    title: str
    statements: tuple[str, ...]
    parameters: Any

    @property
    def name(self) -> str:
        return f"{self.question}: {self.title}"


def spellings(path: Path) -> Iterator[Spelling]:
    """The texts of a file."""
    kind = ""
    for chunk in re.split(r"\n\n+", path.read_text().strip())[1:]:
        if chunk.startswith("===="):
            kind = chunk.removeprefix("==== ")
            continue
        title, *lines = chunk.splitlines()
        parameters = (
            ast.literal_eval(lines.pop(0).removeprefix("-- with ")) if lines[0].startswith("-- with ") else None
        )
        statements = re.split(r";\n", "\n".join(lines))
        yield Spelling(path.stem, kind, title.removeprefix("-- "), tuple(statements), parameters)


SPELLINGS = [one for path in sorted((Path(__file__).parent / "spellings").glob("*.sql")) for one in spellings(path)]


def class_of(split: str, number: int) -> int | None:
    """Three classes, and samples without one."""
    return None if number % (7 if split == "train" else 9) == 5 else number % 3


COLLECTIONS = [(split, count, at) for at in (1, 2) for split, count in (("train", N), ("validation", M))]
RECIPE = Recipe(
    ("fc1", "block.words", "head"),
    2,
    tuple(Collected(split, tuple(range(count)), at) for split, count, at in COLLECTIONS),
    class_of,
)


class Sides:
    """Both sides as arrays: what the right answers are computed from."""

    def __init__(self, plain: PlainStore) -> None:
        self.plain = plain
        self.t, self.v = (plain.relations[name] for name in ("train", "validation"))
        self.ids = [row["sample_id"] for row in self.t]
        self.labels, self.classes = ([row["label"] for row in rows] for rows in (self.t, self.v))
        self.losses, self.costs = (np.array([row["loss"] for row in rows]) for rows in (self.t, self.v))
        self.left, self.right = (np.array([row["gradient"] for row in rows]) for rows in (self.t, self.v))
        self.scores = np.array([[float(a @ b) for b in self.right] for a in self.left])

    def of_class(self, wanted: int | None) -> np.ndarray:
        """Which validation samples are of a class."""
        return np.array([label == wanted for label in self.classes])

    def means(self, scores: np.ndarray) -> Rows:
        """sample_id, mean of its row."""
        return [(number, float(np.mean(row))) for number, row in zip(self.ids, scores, strict=True)]

    def means_over(self, chosen: Callable[[int], np.ndarray]) -> list[float | None]:
        """For each training sample the mean over chosen validation samples; None over none."""
        masks = [chosen(place) for place in range(N)]
        return [float(row[mask].mean()) if mask.any() else None for row, mask in zip(self.scores, masks, strict=True)]


def by_class(sides: Sides) -> Rows:
    return [
        (label, float(np.mean([sides.scores[k] for k in range(N) if sides.labels[k] == label])))
        for label in dict.fromkeys(sides.labels)
    ]


def by_classes(sides: Sides) -> Rows:
    def mean(one: int | None, other: int | None) -> float:
        places = [k for k in range(N) if sides.labels[k] == one]
        return float(sides.scores[places][:, sides.of_class(other)].mean())

    return [(a, b, mean(a, b)) for a in dict.fromkeys(sides.labels) for b in dict.fromkeys(sides.classes)]


def with_own_class(sides: Sides) -> Rows:
    """None for those without a class."""

    def same(place: int) -> np.ndarray:
        label = sides.labels[place]
        return np.zeros(M, dtype=bool) if label is None else sides.of_class(label)

    return list(zip(sides.ids, sides.means_over(same), strict=True))


def tracin(sides: Sides) -> Rows:
    totals = dict.fromkeys(sides.ids, 0.0)
    rates = {row["checkpoint"]: row["learning_rate"] for row in sides.plain.relations["checkpoints"]}
    for number, at, mean in each_checkpoint(sides):
        totals[number] += rates[at] * mean * M
    return list(totals.items())


def each_checkpoint(sides: Sides) -> Rows:
    rows = sides.plain.relations["gradients"]
    means = {
        at: sum(row["gradient"] for row in rows if (row["split"], row["checkpoint"]) == ("validation", at)) / M
        for at in (1, 2)
    }
    chosen = [row for row in rows if row["split"] == "train"]
    return [(row["sample_id"], row["checkpoint"], float(row["gradient"] @ means[row["checkpoint"]])) for row in chosen]


def by_layer(sides: Sides) -> Rows:
    def mean(layer: str) -> float:
        mask = sides.plain.mask(layer)
        return float(np.mean([[float((a * mask) @ b) for b in sides.right] for a in sides.left]))

    return [(layer, mean(layer)) for layer in sides.plain.modules]


def cosines(sides: Sides) -> Rows:
    """NULL, of which avg knows nothing, where a gradient is zero: there are none here."""
    lengths = np.linalg.norm(sides.left, axis=1)[:, None] * np.linalg.norm(sides.right, axis=1)
    assert lengths.all()
    return sides.means(sides.scores / lengths)


def lowest(sides: Sides) -> Rows:
    rows = sorted(sides.means(sides.scores), key=lambda row: row[1])
    assert rows[7][1] - rows[6][1] > 0.01, "the seventh is not clear: take another seed"
    return rows[:7]


def signed(sides: Sides) -> Rows:
    signs = [1 if row["prediction"] == row["label"] else -1 for row in sides.v]
    return [(number, score * M) for number, score in sides.means(sides.scores * signs)]


def ones(sides: Sides) -> Rows:
    means = sides.means_over(lambda _: sides.of_class(1))
    return list(zip(sides.ids, means, strict=True))


def others(sides: Sides) -> Rows:
    ids = np.array([row["sample_id"] for row in sides.v])
    return list(zip(sides.ids, sides.means_over(lambda place: ids != sides.ids[place]), strict=True))


@dataclass(frozen=True)
class Question:
    """The right rows; and how many vectors of a side an answer needs at most, a group of rows each."""

    rows: Callable[[Sides], Rows]
    vectors: int = 1


QUESTIONS = {
    "average_by_sample": Question(lambda s: s.means(s.scores)),
    "average_of_some": Question(lambda s: [row for row, loss in zip(ones(s), s.losses, strict=True) if loss > 1]),
    "average_by_query": Question(
        lambda s: [(row["sample_id"], float(s.scores[:, k].mean())) for k, row in enumerate(s.v)]
    ),
    "average_of_all": Question(lambda s: [(float(s.scores.mean()),)]),
    "average_by_class": Question(by_class),
    # Every training sample with each class, if only one side is added up.
    "class_by_class": Question(by_classes, 4),
    "own_class": Question(lambda s: [row for row in with_own_class(s) if row[1] is not None]),
    "kept_without_partner": Question(with_own_class),
    "weighted": Question(lambda s: s.means(s.scores * s.losses[:, None] * s.costs)),
    "added_weights": Question(lambda s: s.means(s.scores * (s.losses[:, None] + s.costs)), 2),
    "signed": Question(signed),
    "over_checkpoints": Question(tracin, 2),
    "each_checkpoint": Question(each_checkpoint, 2),
    "layer_by_layer": Question(by_layer, 3),
    "cosine": Question(cosines, 2),
    "top": Question(lowest, 2),
    "beside_counts": Question(
        lambda s: [
            (*r, M, float(c * M), float(s.costs.max())) for r, c in zip(s.means(s.scores), s.losses, strict=True)
        ]
    ),
    "two_scores": Question(lambda s: [(*a, b[1]) for a, b in zip(s.means(s.scores), ones(s), strict=True)], 2),
    "most": Question(lambda s: [(number, float(row.max())) for number, row in zip(s.ids, s.scores, strict=True)]),
    "other_samples": Question(others),
    "distinct_values": Question(
        lambda s: [(k, float(sum(set(row.tolist())))) for k, row in zip(s.ids, s.scores, strict=True)]
    ),
    "empty": Question(lambda s: []),
}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Connection, Sides]]:
    path = tmp_path_factory.mktemp("spellings") / "store"
    plain = record(path, RECIPE, 4)
    with metaql.connect(path) as db:
        yield db, Sides(plain)


def ask(db: Connection, spelling: Spelling) -> tuple[Rows, Work]:
    """The rows of the last statement, and what all took."""
    with counted() as work:
        for statement in spelling.statements[:-1]:
            db.sql(statement)
        return db.sql(spelling.statements[-1], spelling.parameters).fetchall(), work


def limit(question: str) -> int:
    """More than this is not cheap."""
    return FACTOR * QUESTIONS[question].vectors * (N + M)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda one: one.name)
def test_spelling(spelling: Spelling, opened: tuple[Connection, Sides]) -> None:
    db, sides = opened
    rows, work = ask(db, spelling)
    if REPORTING:
        print(f"{spelling.kind:9} {work.pairs:6} pairs {work.added:6} added  {spelling.name}")
    # Averages of gradients are rounded to float32 before they are multiplied.
    wrong = differences(QUESTIONS[spelling.question].rows(sides), rows, 2e-6 * float(np.abs(sides.scores).max()) * M)
    text = ";\n".join(spelling.statements)
    assert wrong is None, f"{spelling.name}\n{text}\n{wrong}"
    if spelling.kind == CHEAP:
        most = limit(spelling.question)
        assert work.total <= most, (
            f"{spelling.name}\n{text}\nmultiplied {work.pairs} pairs and added up {work.added} gradients,"
            f" where {N} and {M} rows should take at most {most}"
        )


def test_every_question_has_spellings() -> None:
    assert {one.question for one in SPELLINGS} == QUESTIONS.keys()
    assert {one.kind for one in SPELLINGS} <= {CHEAP, NOT_YET, ANY_COST}
    assert len({one.name for one in SPELLINGS}) == len(SPELLINGS)
