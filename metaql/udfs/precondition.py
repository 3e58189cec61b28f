"""``precondition(g, method, damping := NULL, checkpoint := NULL) -> GRADIENT``: g times the inverse of a curvature.

DuckDB's macros have default values and named arguments, which its functions in Python lack: the macro of this name
calls ``metaql_precondition`` with all four.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from metaql.errors import QueryError
from metaql.methods.curvature import DIAGONAL, EKFAC, KFAC
from metaql.methods.damping import require_positive
from metaql.methods.solvers import ARNOLDI, CG, LISSA
from metaql.storage.arrow_arrays import as_numpy, column
from metaql.udfs import references
from metaql.udfs.curvatures import require_of_checkpoint
from metaql.udfs.definitions import Combination, combine
from metaql.udfs.function import Function, conjunction, one_thread
from metaql.udfs.preconditioned import Preconditioned
from metaql.udfs.references import GRADIENT, References
from metaql.udfs.session import Session
from metaql.udfs.solved import Solved
from metaql.udfs.sources import StoreSource

MACRO = "precondition"
PRECONDITION = "metaql_precondition"
SOLVERS = (CG, LISSA, ARNOLDI)
METHODS = (EKFAC, KFAC, DIAGONAL, *SOLVERS)
DEFINITION = (
    f"{MACRO}(g, method, damping := NULL, checkpoint := NULL) AS {PRECONDITION}(g, method, damping, checkpoint)"
)

# Method, damping and checkpoint.
Settings = tuple[str, float | None, int | None]


def precondition(session: Session) -> Function:
    """NULL where the gradient or the method is NULL; NULL for the other two is their default."""

    def evaluate(gradient: Any, *settings: Any) -> pa.Array:
        children, mask = references.parts(references.array(gradient))
        method, damping, checkpoint = map(references.array, settings)
        if method.null_count:
            mask = conjunction(mask, as_numpy(method.is_valid()))
        found = references.read(children, mask)
        chosen = list(zip(method.to_pylist(), damping.to_pylist(), checkpoint.to_pylist(), strict=True))
        present = chosen if mask is None else [chosen[place] for place in np.flatnonzero(mask)]
        with one_thread():
            numbers = _numbers(session, found, present)
        stores = np.full(len(numbers), session.id, dtype=np.int64)
        return references.write(stores, numbers, column([""] * len(numbers), pa.string()), mask)

    return Function(PRECONDITION, (GRADIENT, "VARCHAR", "DOUBLE", "BIGINT"), GRADIENT, evaluate)


def require_method(method: str) -> None:
    """QueryError unless there is such a method."""
    if method not in METHODS:
        raise QueryError(f"precondition: there is no method '{method}'. There are {', '.join(map(repr, METHODS))}")


def _numbers(session: Session, found: References, settings: list[Settings]) -> references.Ints:
    """The vectors' numbers; equal ones are made once, as most calls are for one gradient beside many rows."""
    codes = np.zeros(len(found), dtype=np.int64) if found.code is None else found.code
    made: dict[tuple[int, int, int, Settings], int] = {}
    numbers = np.zeros(len(found), dtype=np.int64)
    keys = zip(found.store.tolist(), found.row.tolist(), codes.tolist(), settings, strict=True)
    for place, key in enumerate(keys):
        if key not in made:
            made[key] = _number(session, found.at(slice(place, place + 1)), *key[3])
        numbers[place] = made[key]
    return numbers


def _number(session: Session, one: References, method: str, damping: float | None, checkpoint: int | None) -> int:
    require_method(method)
    given = None if damping is None else require_positive(damping)
    gradient = combine(session, one, np.ones(1))
    source = session.source_of(gradient.space)
    if method in SOLVERS:
        return session.vectors.add(_solved(session, source, gradient, method, given, checkpoint))
    fitted = session.curvatures.get(source.store, method, checkpoint)
    if checkpoint is None:
        require_of_checkpoint(session, gradient, method, fitted.saved.checkpoint)
    return session.vectors.add(Preconditioned(gradient, fitted, given))


def _solved(
    session: Session,
    source: StoreSource,
    gradient: Combination,
    method: str,
    damping: float | None,
    checkpoint: int | None,
) -> Solved:
    if damping is None:
        raise QueryError(
            f"'{method}' needs a damping, such as damping := 0.01: the Hessian may have negative eigenvalues, and it"
            " has to outweigh them"
        )
    own = session.model(source.name).checkpoint
    if checkpoint not in (None, own):
        raise QueryError(f"'{method}' runs the model at its checkpoint, {own}, and not at {checkpoint}")
    if checkpoint is None:
        require_of_checkpoint(session, gradient, method, own)
    return Solved(gradient, source.name, method, damping)
