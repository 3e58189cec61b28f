"""``metaql_best(measure, g, members, k, side) -> STRUCT(member BIGINT, score DOUBLE)[]``: the likely best pairs.

What compiled SQL calls for the k best of all pairs of two relations, before it sorts: of the scores that a call
computes (``scores.py``) it hands back those that are among the k best of their ``side``, ties included, so that a
thousand times fewer leave Python. Best among a call's rows only: what is best of all is among them, not all of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import torch

from metaql.errors import QueryError
from metaql.storage.arrow_arrays import primitive
from metaql.udfs.crossed import Tile, tiles
from metaql.udfs.function import Function, one_thread
from metaql.udfs.references import GRADIENT, Bools, Floats, array
from metaql.udfs.scores import as_lists
from metaql.udfs.session import Session

BEST = "metaql_best"
PAIR = "STRUCT(member BIGINT, score DOUBLE)"
# Scores compared at a time to find a bound: the k largest of so many maxima are k scores.
RUN = 32


def best(session: Session) -> Function:
    """The list's members by number, from 1, with their scores, for each row; NULL where there is no list.

    ``k`` > 0 asks for the largest and < 0 for the smallest, in DuckDB's order, where NULL is last and NaN the
    largest. ``side`` is whose k best: 'member', each of the list; 'row', each gradient; 'all', of all pairs.
    """

    def evaluate(measure: Any, gradients: Any, lists: Any, count: Any, side: Any) -> pa.Array:
        k, side = array(count)[0].as_py(), array(side)[0].as_py()
        if side not in _AXES or not k:
            raise QueryError(f"{BEST} takes a count other than 0, and one of {', '.join(_AXES)}")
        with one_thread():
            found = [_kept(tile, k, side) for tile in tiles(session, measure, gradients, lists)]
        rows, members, scores, known = (
            np.concatenate([one[part] for one in found]) if found else np.zeros(0, dtype=np.int64) for part in range(4)
        )
        order = np.argsort(rows, kind="stable")
        offsets = np.concatenate([[0], np.bincount(rows, minlength=len(gradients)).cumsum()])
        values = primitive(scores[order], pa.float64(), known[order].astype(np.bool_))
        pairs = pa.StructArray.from_arrays([primitive(members[order] + 1, pa.int64()), values], ["member", "score"])
        return as_lists(offsets, pairs, lists)

    return Function(BEST, ("VARCHAR", GRADIENT, "BIGINT", "BIGINT", "VARCHAR"), f"{PAIR}[]", evaluate)


# Along which axis of [rows, members] a side's scores lie.
_AXES = {"member": 0, "row": 1, "all": None}


def _kept(tile: Tile, k: int, side: str) -> tuple[Any, Any, Floats, Bools]:
    """(row, member, score, known) of each pair that is kept."""
    values = _ordered(tile, k)
    axis = _AXES[side]
    if axis is None:
        keep = values >= _bound(values.reshape(1, -1), abs(k), 1)
    else:
        keep = values >= _bound(values, abs(k), axis)
    places = np.flatnonzero(keep.numpy())
    rows, members = np.divmod(places, tile.scores.shape[1])
    known = np.ones(len(places), dtype=np.bool_) if tile.known is None else tile.known.reshape(-1)[places]
    return tile.rows[rows], members, tile.scores.reshape(-1)[places], known


def _ordered(tile: Tile, k: int) -> torch.Tensor:
    """The scores as numbers of which the largest are wanted."""
    values = torch.from_numpy(tile.scores)
    if k < 0:
        values = -values
    if tile.known is not None:
        values = values.masked_fill(~torch.from_numpy(tile.known), -torch.inf)
    if bool(values.isnan().any()):
        values = values.nan_to_num(torch.inf if k > 0 else -torch.inf, torch.inf, -torch.inf)
    return values


def _bound(values: torch.Tensor, k: int, axis: int) -> torch.Tensor:
    """A number not above the k-th largest along the axis, and near it; -inf where there are no more than k."""
    n = values.shape[axis]
    if n <= k:
        return values.new_full((1, 1), -torch.inf)
    run = min(RUN, n // k)
    whole = values.narrow(axis, 0, n // run * run).unflatten(axis, (-1, run))
    largest: torch.Tensor = whole.amax(axis + 1).topk(k, axis).values
    return largest.narrow(axis, k - 1, 1)
