"""Products of a split's rows with one vector, as look-ups in the scores of the whole split."""

from __future__ import annotations

from sqlglot import exp

from metaql.bind import aggregates_of
from metaql.catalogue import Catalogue, Stretch, alias_of
from metaql.scope import Scope, Unsure, name_of
from metaql.udfs.scan import SCAN
from metaql.udfs.score import SCORE

# Where a node keeps the product that it stands for.
SCANNED = "scanned"


def scan_whole_splits(select: exp.Select, catalogue: Catalogue) -> bool:
    """score(t.gradient, v, n) => list_extract(scan(all rows of t's split, v), t's row), where that costs less.

    Only for a vector that does not depend on the row, and where no LIMIT may stop the scan early; whether there
    was any.
    """
    calls = [one for one in select.find_all(exp.Anonymous) if name_of(one) == SCORE]
    calls = [one for one in calls if one.find_ancestor(exp.Query) is select and not one.find_ancestor(exp.Lambda)]
    if not calls or _stops_early(select, catalogue):
        return False
    try:
        scope = Scope(select, catalogue)
        found = [(call, _stretch(call, scope, catalogue)) for call in calls]
    except Unsure:
        return False
    for call, stretch in found:
        if stretch is not None:
            call.replace(_looked_up(call, stretch))
    return any(stretch is not None for _, stretch in found)


def _stops_early(select: exp.Select, catalogue: Catalogue) -> bool:
    if not select.args.get("limit") or select.args.get("order") or select.args.get("group"):
        return False
    return not aggregates_of(select, catalogue)


def _stretch(call: exp.Anonymous, scope: Scope, catalogue: Catalogue) -> Stretch | None:
    left, right, rows = call.expressions
    if not isinstance(left, exp.Column) or left.name.lower() != "gradient" or not isinstance(right, exp.Subquery):
        return None
    owners = scope.owners(left)
    if len(owners) != 1 or scope.reads(right):
        return None
    item = next(one for number, one in enumerate(scope.items) if alias_of(one, number) in owners)
    name = catalogue.stored(item, scope.select)
    aliased = item.args.get("alias")
    if name is None or (aliased is not None and aliased.columns):
        return None
    return catalogue.names.scan(name, float(rows.name))


def _looked_up(call: exp.Anonymous, stretch: Stretch) -> exp.Expr:
    left, right, _ = call.expressions
    numbers = [exp.Literal.number(number) for number in (stretch.store, stretch.first, stretch.rows)]
    scan = exp.Select(expressions=[exp.Anonymous(this=SCAN, expressions=[*numbers, right.copy()])])
    row = exp.Dot(this=left.copy(), expression=exp.to_identifier("row", quoted=True))
    place = exp.Sub(this=row, expression=exp.Literal.number(stretch.first - 1))
    found = exp.Anonymous(this="list_extract", expressions=[exp.Subquery(this=scan), place])
    kept = call.copy()
    kept.meta[SCANNED] = True
    found.meta[SCANNED] = kept
    return found
