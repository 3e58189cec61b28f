"""A call's rows with every member of the lists beside them, as matrices; for ``metaql_scores`` and ``metaql_best``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from metaql.errors import QueryError
from metaql.storage.arrow_arrays import as_numpy, primitive
from metaql.udfs import references
from metaql.udfs.references import Bools, Floats, Ints, References
from metaql.udfs.rows import Rows
from metaql.udfs.scoring import squared_norms
from metaql.udfs.session import Session
from metaql.udfs.tiles import every_pair

# Scores of every left reference with every right one, and where they are known; None stands for everywhere.
Measure = Callable[[Session, References, References], tuple[Floats, Bools | None]]


@dataclass(frozen=True)
class Tile:
    """Scores of some of a call's rows, by their places, with the members of one list: [rows, members].

    They are NULL where not ``known``; None stands for known everywhere.
    """

    rows: Ints
    scores: Floats
    known: Bools | None


def tiles(session: Session, measure: Any, gradients: Any, lists: Any) -> list[Tile]:
    """The scores of a call, list by list, of all rows beside a list. As a rule there is one list."""
    measure = _measure(references.array(measure)[0].as_py())
    numbers = references.array(lists)
    children, there = references.parts(references.array(gradients))
    session.counters.add(calls=1)
    there_is_list = np.flatnonzero(as_numpy(numbers.is_valid()))
    list_numbers = as_numpy(numbers.drop_null())
    found = []
    for number in numbers.unique().drop_null().to_pylist():
        rows = there_is_list[list_numbers == number]
        some, mask = children, there
        if len(rows) < len(numbers):
            some, mask = (
                [child.take(primitive(rows, pa.int64())) for child in children],
                None if there is None else there[rows],
            )
        found.append(Tile(rows, *_scored(session, measure, references.read(some, mask), mask, number)))
    return found


def _scored(
    session: Session, measure: Measure, left: References, there: Bools | None, number: int
) -> tuple[Floats, Bools | None]:
    members = session.members.get(number)
    scores, known = measure(session, left, members.gradients)
    if there is None and members.mask is None:
        return scores, known
    rows = np.ones(len(left), dtype=np.bool_) if there is None else there
    columns = np.ones(len(members), dtype=np.bool_) if members.mask is None else members.mask
    places = np.ix_(rows, columns)
    spread, spread_known = np.zeros((len(rows), len(columns))), np.zeros((len(rows), len(columns)), dtype=np.bool_)
    spread[places], spread_known[places] = scores, True if known is None else known
    return spread, spread_known


def _products(session: Session, left: References, right: References) -> tuple[Floats, Bools | None]:
    """⟨g, h⟩, computed in the stores' own precision layer by layer."""
    result = None
    for rows, pattern, places in _resolved(session, left):
        for others, other_pattern, columns in _resolved(session, right):
            terms = rows.source.space.shared(pattern, others.source.space, other_pattern)
            scores = every_pair(session, terms, rows, others)
            if scores.shape == (len(left), len(right)):
                return scores, None
            result = np.zeros((len(left), len(right))) if result is None else result
            result[np.ix_(places, columns)] = scores
    return np.zeros((len(left), len(right))) if result is None else result, None


def _cosines(session: Session, left: References, right: References) -> tuple[Floats, Bools | None]:
    """⟨g, h⟩ / (‖g‖·‖h‖), unknown where one is zero."""
    scores, _ = _products(session, left, right)
    lengths = np.sqrt(np.maximum(np.outer(squared_norms(session, left), squared_norms(session, right)), 0))
    known = lengths > 0
    return np.clip(np.divide(scores, lengths, where=known, out=np.zeros_like(scores)), -1, 1), known


def _resolved(session: Session, found: References) -> Iterator[tuple[Rows, str, Ints]]:
    """The rows behind references by where they come from, with their pattern and their places."""
    for store, pattern, places in found.groups():
        numbers, at = found.row[places], np.arange(len(found))[places]
        for source, inner in session.resolve(store, numbers):
            yield Rows(source, numbers[inner]), pattern, at[inner]


def _measure(name: str) -> Measure:
    measures: dict[str, Measure] = {"inner_product": _products, "cosine_similarity": _cosines}
    if name not in measures:
        raise QueryError(f"{name!r} is no measure of two gradients. There are: {', '.join(measures)}")
    return measures[name]
