"""What random queries are made of: sides, conditions, weights, scores, keys and aggregates."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.queries.model import (
    Aggregate,
    Call,
    Case,
    Column,
    Constant,
    Exists,
    Expr,
    In,
    IsNull,
    Negative,
    Op,
    Select,
    Source,
    all_of,
    inner_product,
    product,
)
from tests.queries.stores import PlainStore

Named = tuple[str, Expr]


def number(value: float) -> Constant:
    """A number that the text may say by a parameter."""
    return Constant(value, free=True)


class Parts:
    """Random parts of queries over one store."""

    def __init__(self, rng: np.random.Generator, store: PlainStore) -> None:
        self._rng, self._store = rng, store
        self._count = 0

    def _pick(self, options: Any) -> Any:
        options = list(options)
        return options[int(self._rng.integers(len(options)))]

    def _maybe(self, chance: float) -> bool:
        return bool(self._rng.random() < chance)

    def _query_relation(self) -> str:
        return str(self._pick(["validation", "validation", "validation", *({"test"} & self._store.relations.keys())]))

    def _side(self, name: str, relation: str, chance: float) -> Source:
        where = all_of(*(self._filter(name) for _ in range(2) if self._maybe(chance)))
        return Source(name, relation, where)

    def _split(self, name: str, split: str) -> Source:
        where = Op("=", Column(name, "split"), Constant(split))
        return Source(name, "gradients", all_of(where, IsNull(Column(name, "checkpoint"), negated=True)))

    def _filter(self, name: str) -> Expr:
        label, loss, number_ = (Column(name, column) for column in ("label", "loss", "sample_id"))
        self._count += 1
        o, w = f"o{self._count}", f"w{self._count}"
        other = Source(o, "outputs", Op("<", Column(o, "loss"), number(0.6)))
        wanted = Source(w, "outputs", Op(">", Column(w, "loss"), number(1.1)))
        tied = Op("=", Column(o, "sample_id"), number_)
        choices: list[Expr] = [
            Op(">", loss, number(0.6)),
            Op("<", loss, number(1.7)),
            Op("=", label, number(1)),
            Op("<>", label, number(1)),
            Op("=", Op("%", number_, Constant(2)), Constant(0)),
            Op("OR", IsNull(label), Op(">", loss, number(1.1))),
            IsNull(label, negated=True),
            Op("=", Column(name, "prediction"), label),
            Exists(Select((other,), (("one", Constant(1)),), where=tied)),
            In(number_, Select((wanted,), (("id", Column(w, "sample_id")),))),
            Op(">", loss, number(99.0)),
        ]
        return choices[int(self._rng.integers(len(choices)))]

    def _pair_condition(self) -> Expr:
        return self._pick(
            [
                self._equal("label", "t", "v"),
                self._equal("label", "t", "v"),
                Op("<>", Column("t", "label"), Column("v", "label")),
                Op("<>", Column("t", "sample_id"), Column("v", "sample_id")),
                Op("IS NOT DISTINCT FROM", Column("t", "label"), Column("v", "label")),
                Op(">", Column("t", "loss"), Column("v", "loss")),
            ]
        )

    def _maybe_pair_condition(self) -> Expr | None:
        return self._pair_condition() if self._maybe(0.2) else None

    def _equal(self, name: str, one: str, other: str) -> Expr:
        return Op("=", Column(one, name), Column(other, name))

    def _vector(self, name: str, fancy: float = 0.3) -> Expr:
        column: Expr = Column(name, "gradient")
        if self._maybe(fancy / 2):
            column = Case(Op("<>", Column(name, "sample_id"), Constant(2)), column)
        if self._maybe(fancy):
            column = Call("layers", (column, Constant(self._pattern())))
        return column

    def _pattern(self) -> str:
        dotted = {name.split(".")[0] for name in self._store.modules if "." in name}
        return str(self._pick([*self._store.modules, "*.weight", "*", "fc1.bias", *sorted(dotted)]))

    def _score(self, left: Expr, right: Expr) -> Expr:
        if self._maybe(0.15):
            return Call("cosine_similarity", (left, right))
        if self._maybe(0.15):
            parts = [inner_product(Call("layers", (left, Constant(self._pattern()))), right) for _ in range(2)]
            return Op("+", parts[0], Op("*", number(2), parts[1]))
        return inner_product(left, right)

    def _weight(self, name: str) -> Expr | None:
        loss, label = Column(name, "loss"), Column(name, "label")
        sign = Case(Op("=", label, Constant(1)), Constant(1), Negative(Constant(1)))
        return self._pick([None, None, None, loss, label, Negative(loss), number(0.5), sign, Op("-", loss, number(1))])

    def _weighted(self, score: Expr, names: str) -> Expr:
        if self._maybe(0.1):
            return product(Op(self._pick("+-"), *(Column(name, "loss") for name in names)), score)
        if self._maybe(0.1):
            by = self._pick(
                [Column(names[-1], "loss"), Call("nullif", (Column(names[0], "label"), Constant(0))), number(4)]
            )
            return Op("/", score, by)
        if self._maybe(0.05):
            return Negative(score)
        if self._maybe(0.08):
            return Op(self._pick("+-"), score, self._pick([number(1), *(Column(name, "loss") for name in names)]))
        if self._maybe(0.05):
            same = Op("=", *(Column(name, "label") for name in names))
            return product(Case(same, Constant(1), Negative(Constant(1))), score)
        factors = [score, *(self._weight(name) for name in names)]
        return product(*(factors[place] for place in self._rng.permutation(len(factors))))

    def _aggregate(self, argument: Expr, sums: float = 0.35) -> Expr:
        name = "sum" if self._maybe(sums) else "avg"
        if self._maybe(0.06):
            name = self._pick(["max", "min", "count"])
        where = None
        if self._maybe(0.06):
            found = [one for one in argument.walk() if isinstance(one, Column) and one.name == "gradient"]
            where = Op(">", Column(found[0].source, "sample_id"), Constant(1)) if found else None
        # Two numbers that are equal on paper need not be when they are rounded.
        exact = all(isinstance(one, Column | Constant | Negative) or _is_exact(one) for one in argument.walk())
        return Aggregate(name, argument, exact and self._maybe(0.05), where)

    def _others(self) -> list[Named]:
        choices = [
            Aggregate("count", None),
            Aggregate("count", Column("t", "label")),
            Aggregate("min", Column("t", "loss")),
            Aggregate("max", Column("v", "loss")),
            Aggregate("sum", Column("t", "loss")),
            Aggregate("avg", Column("v", "loss")),
            Aggregate("count", Column("v", "label"), distinct=True),
            Aggregate("max", inner_product(Column("t", "gradient"), Column("v", "gradient"))),
            Aggregate("avg", inner_product(Column("t", "gradient"), Column("v", "gradient"))),
        ]
        count = self._pick([0, 0, 0, 1, 2])
        return [(f"other{place}", self._pick(choices)) for place in range(count)]

    def _train_keys(self) -> tuple[Expr, ...]:
        one, label = Column("t", "sample_id"), Column("t", "label")
        return self._pick([(one,), (one, label), (label,), (Op("%", one, Constant(3)),), ()])

    def _keys(self) -> tuple[Expr, ...]:
        other = Column("v", "sample_id")
        rest = [
            (other,),
            (Column("v", "label"),),
            (Column("t", "label"), Column("v", "label")),
            (Op("-", Column("t", "sample_id"), other),),
        ]
        return self._train_keys() if self._maybe(0.65) else self._pick(rest)

    def _mean(self, keys: tuple[Expr, ...]) -> Select:
        argument = product(self._weight("v"), self._vector("v"))
        columns = [("label", key) for key in keys]
        total = Aggregate(self._pick(["avg", "avg", "sum"]), argument)
        return Select((self._side("v", self._query_relation(), 0.3),), (*columns, ("mean", total)), keys=keys)

    def _grouped(self, sources: tuple[Source, ...], keys: tuple[Expr, ...], columns: list[Named]) -> Select:
        # Sometimes a key is not shown.
        shown = () if keys and self._maybe(0.06) else keys
        named = [(f"k{place}", key) for place, key in enumerate(shown)]
        return Select(sources, (*named, *columns), keys=keys)


def _is_exact(expression: Expr) -> bool:
    """Whether no rounding happens here, of the small whole numbers and quarters that the stores hold."""
    match expression:
        case Op("*" | "+" | "-" | "=" | "<>", _, _):
            return True
        case Call("inner_product" | "layers", arguments):
            return not any(isinstance(one, Column) and one.name == "mean" for one in arguments)
    return False
