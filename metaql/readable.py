"""SQL as its user would have written it: without the planner's own functions and names."""

from __future__ import annotations

from sqlglot import exp

from metaql.parse import to_sql
from metaql.scanned import SCANNED
from metaql.scope import name_of
from metaql.udfs.aggregates import MEAN
from metaql.udfs.aggregates import SUM as TOTAL
from metaql.udfs.score import SCORE

# What the functions over lists are called in SQL.
NAMES = {MEAN: "avg", TOTAL: "sum"}


def vector_text(node: exp.Expr) -> str:
    """A vector as its user would write it."""
    return short(readable(node), 60)


def readable(node: exp.Expr) -> str:
    """Our functions by the names that users know."""

    def plain(one: exp.Expr) -> exp.Expr:
        if "was" in one.meta:
            return exp.var(one.meta["was"])
        if SCANNED in one.meta:
            one = one.meta[SCANNED]
        if isinstance(one, exp.Anonymous) and name_of(one) == SCORE:
            return exp.Anonymous(this="inner_product", expressions=one.expressions[:2])
        if isinstance(one, exp.Anonymous) and name_of(one) in NAMES:
            return exp.Anonymous(this=NAMES[name_of(one)], expressions=[_weighted(one)])
        if isinstance(one, exp.Subquery) and isinstance(one.this, exp.Select) and gathers(one):
            inner: exp.Expr = one.this.expressions[0].unalias()
            return inner
        return one

    text = node.copy()
    for _ in range(4):
        # A sum of sums in a sub-query: each round looks one level deeper.
        text = text.transform(plain)
    return to_sql(text, comments=False)


def _weighted(call: exp.Anonymous) -> exp.Expr:
    """{gradient: g, weight: w} in a list as w·g."""
    fields = {one.name: one.expression for one in call.find_all(exp.PropertyEQ)}
    if set(fields) != {"gradient", "weight"}:
        listed: exp.Expr = call.expressions[0].copy()
        return listed
    weight = fields["weight"].this if isinstance(fields["weight"], exp.Cast) else fields["weight"]
    if isinstance(weight, exp.Literal) and weight.name == "1":
        gradient: exp.Expr = fields["gradient"].copy()
        return gradient
    return exp.Mul(this=exp.paren(weight.copy()), expression=fields["gradient"].copy())


def short(text: str, most: int = 90) -> str:
    """One line, cut off where it gets long."""
    text = " ".join(text.split())
    return text if len(text) <= most else text[: most - 1] + "…"


def gathers(item: exp.Expr) -> bool:
    """Whether gradients are averaged or added up in it."""
    return any(name_of(node) in NAMES for node in item.find_all(exp.Anonymous))
