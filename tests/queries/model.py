"""A query as data: what ``evaluate`` computes by loops and ``spelling`` prints as SQL, neither knowing the other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class Expr:
    """An expression of one row of each source, or of a group of them."""

    def children(self) -> Iterator[Expr]:
        """The expressions directly inside, those of sub-queries not included."""
        for one in fields(self):
            value = getattr(self, one.name)
            yield from (each for each in (value if isinstance(value, tuple) else (value,)) if isinstance(each, Expr))

    def walk(self) -> Iterator[Expr]:
        """This and all inside."""
        yield self
        for child in self.children():
            yield from child.walk()


@dataclass(frozen=True)
class Column(Expr):
    source: str
    name: str


@dataclass(frozen=True)
class Constant(Expr):
    """A number, a text, a truth value or NULL; ``free`` when the text may say it by a parameter."""

    value: Any
    free: bool = False


@dataclass(frozen=True)
class Op(Expr):
    """``left op right`` with NULL in, NULL out, but for AND, OR and IS NOT DISTINCT FROM."""

    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Negative(Expr):
    value: Expr


@dataclass(frozen=True)
class IsNull(Expr):
    value: Expr
    negated: bool = False


@dataclass(frozen=True)
class Case(Expr):
    """``CASE WHEN condition THEN value ELSE otherwise END``; NULL without the last."""

    condition: Expr
    value: Expr
    otherwise: Expr | None = None


@dataclass(frozen=True)
class Call(Expr):
    """One of our functions, or ``nullif``, ``abs``, ``coalesce``."""

    name: str
    arguments: tuple[Expr, ...]


@dataclass(frozen=True)
class Aggregate(Expr):
    """``argument`` None is ``count(*)``."""

    name: str
    argument: Expr | None
    distinct: bool = False
    where: Expr | None = None


@dataclass(frozen=True)
class Window(Expr):
    """``name(argument) OVER (PARTITION BY … ORDER BY …)``: rank, count, sum or avg of a whole partition."""

    name: str
    argument: Expr | None = None
    partition: tuple[Expr, ...] = ()
    order: Expr | None = None


@dataclass(frozen=True)
class Scalar(Expr):
    """The only value of a sub-query."""

    select: Select


@dataclass(frozen=True)
class Exists(Expr):
    select: Select


@dataclass(frozen=True)
class In(Expr):
    value: Expr
    select: Select


@dataclass(frozen=True)
class Source:
    """What a name in FROM stands for. ``join`` is cross, inner, left, right or full; ``where`` reads this source alone.

    A select that reads the sources before it makes a lateral join.
    """

    name: str
    of: str | Select
    where: Expr | None = None
    join: str = "cross"
    on: Expr | None = None
    lateral: bool = False


@dataclass(frozen=True)
class Select:
    """A query. ``keys`` None: no aggregation; (): one group of all rows."""

    sources: tuple[Source, ...]
    columns: tuple[tuple[str, Expr], ...]
    keys: tuple[Expr, ...] | None = None
    where: Expr | None = None
    having: Expr | None = None
    qualify: Expr | None = None
    order: tuple[tuple[str, bool], ...] = ()
    limit: int | None = None
    offset: int = 0
    distinct: bool = False

    def with_(self, **changes: Any) -> Select:
        """The same with other parts."""
        return replace(self, **changes)


def all_of(*conditions: Expr | None) -> Expr | None:
    """Their conjunction; None of nothing."""
    result = None
    for one in conditions:
        if one is not None:
            result = one if result is None else Op("AND", result, one)
    return result


def product(*factors: Expr | None) -> Expr:
    """Their product, from left to right."""
    result = None
    for one in factors:
        if one is not None:
            result = one if result is None else Op("*", result, one)
    assert result is not None
    return result


def inner_product(left: Expr, right: Expr) -> Expr:
    return Call("inner_product", (left, right))


def everything(select: Select) -> Iterator[Expr]:
    """Every expression of a select and of those inside."""
    own = [expression for _, expression in select.columns]
    own += [*(select.keys or ()), *(source.on for source in select.sources if source.on is not None)]
    own += [source.where for source in select.sources if source.where is not None]
    own += [one for one in (select.where, select.having, select.qualify) if one is not None]
    for expression in own:
        for one in expression.walk():
            yield one
            if isinstance(one, Scalar | Exists | In):
                yield from everything(one.select)
    for source in select.sources:
        if isinstance(source.of, Select):
            yield from everything(source.of)


def is_vector(expression: Expr | None) -> bool:
    """Whether it is a gradient: it has one that no function made a number of."""
    match expression:
        case Column(_, name):
            return name in ("gradient", "mean", "total", "g")
        case Call(name, _):
            return name == "layers"
        case Op(_, left, right):
            return is_vector(left) or is_vector(right)
        case Negative(value):
            return is_vector(value)
        case Case(_, value, _):
            return is_vector(value)
    return False


def averages_vectors(select: Select) -> bool:
    """Whether it has an average or a sum of gradients, which only a plan can run."""
    return any(isinstance(one, Aggregate) and is_vector(one.argument) for one in everything(select))
