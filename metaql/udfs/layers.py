"""``layers(g, pattern) -> GRADIENT``: the same vector, restricted to the parameters that a pattern selects."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from metaql.udfs import references
from metaql.udfs.function import Function, conjunction
from metaql.udfs.patterns import AND
from metaql.udfs.references import GRADIENT, Bools
from metaql.udfs.session import Session


def layers(session: Session) -> Function:
    """NULL where the gradient or the pattern is NULL. A pattern that selects nothing is an error."""

    def evaluate(gradient: Any, pattern: Any) -> pa.Array:
        gradient, pattern, mask = arguments(gradient, pattern)
        found, combined = restricted(session, gradient, pattern, mask)
        return references.write(found.store, found.row, combined, mask)

    return Function("layers", (GRADIENT, "VARCHAR"), GRADIENT, evaluate)


def arguments(gradient: Any, pattern: Any) -> tuple[pa.StructArray, pa.StringArray, Bools | None]:
    """Both columns, and where neither is NULL."""
    gradient, pattern = references.array(gradient), references.array(pattern)
    present = pattern.is_valid().to_numpy(zero_copy_only=False) if pattern.null_count else None
    return gradient, pattern, conjunction(references.valid(gradient), present)


def restricted(
    session: Session, gradient: pa.StructArray, pattern: pa.StringArray, mask: Bools | None
) -> tuple[references.References, pa.StringArray]:
    """The references where the mask says, and their patterns joined with the new ones, all of them checked."""
    before = gradient.field(2)
    if mask is not None:
        before, pattern = before.filter(pa.array(mask)), pattern.filter(pa.array(mask))
    whole = pc.equal(before, "")
    combined = pc.if_else(whole, pattern, pc.binary_join_element_wise(before, pattern, AND))
    found = references.read(gradient, mask)
    check = pa.StructArray.from_arrays(
        [pa.array(found.store), pa.array(found.row), combined], fields=list(references.ARROW_TYPE)
    )
    for store, joined, places in references.read(check).groups():
        for source, _ in session.resolve(store, found.row[places]):
            source.space.select(joined)
    return found, combined
