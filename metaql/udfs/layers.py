"""``layers(g, pattern) -> GRADIENT``: the same vector, restricted to the parameters that a pattern selects."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from metaql.udfs import references
from metaql.udfs.function import Function, conjunction
from metaql.udfs.patterns import AND
from metaql.udfs.references import GRADIENT, Bools, References
from metaql.udfs.session import Session


def layers(session: Session) -> Function:
    """NULL where the gradient or the pattern is NULL. A pattern that selects nothing is an error."""

    def evaluate(gradient: Any, pattern: Any) -> pa.Array:
        found, combined, mask = restricted(session, gradient, pattern)
        return references.write(found.store, found.row, combined, mask)

    return Function("layers", (GRADIENT, "VARCHAR"), GRADIENT, evaluate)


def restricted(session: Session, gradient: Any, pattern: Any) -> tuple[References, pa.StringArray, Bools | None]:
    """References under their own patterns joined with the new ones, where neither is NULL; and that mask.

    Every joined pattern is checked: one that selects nothing is an error.
    """
    children, mask = references.parts(references.array(gradient))
    added = references.array(pattern)
    if added.null_count:
        mask = conjunction(mask, added.is_valid().to_numpy(zero_copy_only=False))
    if mask is not None:
        children = [child.filter(pa.array(mask)) for child in children]
        added = added.filter(pa.array(mask))
    before = children[2]
    combined = pc.if_else(pc.equal(before, ""), added, pc.binary_join_element_wise(before, added, AND))
    found = references.read([*children[:2], combined], None)
    for store, joined, places in found.groups():
        for source, _ in session.resolve(store, found.row[places]):
            source.space.select(joined)
    return found, combined, mask
