"""Draws random queries, in the shapes that people give them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.queries.around import Around
from tests.queries.model import (
    Aggregate,
    Call,
    Column,
    Constant,
    Expr,
    IsNull,
    Op,
    Scalar,
    Select,
    Source,
    all_of,
    inner_product,
    product,
)
from tests.queries.parts import Parts, number


class Draw(Parts):
    """Random queries over one store."""

    def select(self) -> Select:
        """A query whose rows are a matter of its meaning alone: no tie decides what a LIMIT leaves."""
        shapes: list[tuple[int, Callable[[], Select]]] = [
            (10, self.average_of_pairs),
            (4, self.pairs_inside),
            (3, self.correlated),
            (3, self.lateral),
            (4, self.product_with_mean),
            (3, self.means_of_classes),
            (3, self.over_checkpoints),
            (2, self.means_over_checkpoints),
            (3, self.over_layers),
            (2, self.norms),
            (3, self.with_users_table),
            (2, self.outer_join),
            (3, self.three_sides),
            (2, self.with_metadata),
        ]
        if self._store.relations["steps"]:
            shapes.append((6, self.along_trajectory))
        weights = np.array([weight for weight, _ in shapes])
        place = int(self._rng.choice(len(shapes), p=weights / weights.sum()))
        return Around(self._rng, self._store).finished(shapes[place][1]())

    def average_of_pairs(self) -> Select:
        """One SELECT over both sides: keys, a score, perhaps other aggregates."""
        t, v = self._side("t", "train", 0.35), self._side("v", self._query_relation(), 0.3)
        if self._maybe(0.15):
            t, v = v, t
        condition = self._pair_condition() if self._maybe(0.2) else None
        second = Source(v.name, v.of, v.where, "inner" if condition is not None else "cross", condition)
        score = self._aggregate(self._weighted(self._score(self._vector("t"), self._vector("v")), "tv"))
        return self._grouped((t, second), self._keys(), [("score", score), *self._others()])

    def pairs_inside(self) -> Select:
        """Pairs in a sub-query, aggregated outside."""
        score = self._weighted(self._score(self._vector("t"), self._vector("v")), "tv")
        columns = tuple((f"{alias}_{name}", Column(alias, name)) for alias in "tv" for name in ("sample_id", "label"))
        weight = ("weight", Column(self._pick("tv"), "loss"))
        sources = self._side("t", "train", 0.3), self._side("v", self._query_relation(), 0.3)
        pairs = Select(sources, (*columns, weight, ("pair", score)), where=self._maybe_pair_condition())
        inside = self._pick([None, None, Column("p", "weight"), number(2.0)])
        keys = self._pick(["t_sample_id", "t_sample_id", "t_label", "v_sample_id", "t_label v_label", ""]).split()
        total = self._aggregate(product(inside, Column("p", "pair")))
        outer = Source("p", pairs, self._pick([None, None, Op("<", Column("p", "v_sample_id"), number(12))]))
        return self._grouped((outer,), tuple(Column("p", key) for key in keys), [("score", total)])

    def correlated(self) -> Select:
        """A scalar sub-query for each training sample."""
        inner = self._over_query_side()
        columns = [("k0", Column("t", "sample_id")), ("score", Scalar(inner))]
        if self._maybe(0.3):
            columns.append(("twice", Op("*", Scalar(inner), number(2))))
        return Select((self._side("t", "train", 0.3),), tuple(columns))

    def lateral(self) -> Select:
        """The same in FROM; perhaps averaged once more."""
        sources = self._side("t", "train", 0.3), Source("x", self._over_query_side(), lateral=True)
        if self._maybe(0.4):
            return self._grouped(sources, self._train_keys(), [("score", self._aggregate(Column("x", "s")))])
        return Select(sources, (("k0", Column("t", "sample_id")), ("score", Column("x", "s"))))

    def _over_query_side(self) -> Select:
        score = self._weighted(self._score(self._vector("t"), self._vector("v")), "tv")
        where = self._pair_condition() if self._maybe(0.3) else None
        source = self._side("v", self._query_relation(), 0.3)
        return Select((source,), (("s", Aggregate(self._pick(["avg", "sum"]), score)),), keys=(), where=where)

    def product_with_mean(self) -> Select:
        """An inner product with an average, which is a sub-query in FROM or a value."""
        mean = self._mean(())
        if self._maybe(0.5):
            vector: Expr = Scalar(mean)
            sources: tuple[Source, ...] = (self._side("t", "train", 0.3),)
        else:
            vector = Column("m", "mean")
            sources = (self._side("t", "train", 0.3), Source("m", mean))
        score = product(self._weight("t"), self._score(self._vector("t"), vector))
        if self._maybe(0.4):
            return self._grouped(sources, self._train_keys(), [("score", self._aggregate(score))])
        extra = self._pick([[], [("alike", Call("cosine_similarity", (Column("t", "gradient"), vector)))]])
        return Select(sources, (("k0", Column("t", "sample_id")), ("score", score), *extra))

    def means_of_classes(self) -> Select:
        """Each training sample with the mean of its class, or of every class."""
        mean = self._mean((Column("v", "label"),))
        joined = self._maybe(0.6)
        on = self._equal("label", "t", "m") if joined else None
        sources = self._side("t", "train", 0.3), Source("m", mean, None, "inner" if joined else "cross", on)
        score = product(self._weight("t"), self._score(self._vector("t"), Column("m", "mean")))
        keys = self._pick(
            [(), (Column("m", "label"),), (Column("t", "sample_id"),), (Column("t", "label"), Column("m", "label"))]
        )
        if self._maybe(0.5):
            return self._grouped(sources, keys, [("score", self._aggregate(score))])
        return Select(sources, (("k0", Column("t", "sample_id")), ("k1", Column("m", "label")), ("score", score)))

    def over_checkpoints(self) -> Select:
        """TracIn, pair by pair: both sides at the same checkpoint, times its learning rate."""
        a, b = self._split("a", "train"), self._split("b", "validation")
        b = Source("b", b.of, b.where, "inner", self._equal("checkpoint", "a", "b"))
        c = Source("c", "checkpoints", None, "inner", self._equal("checkpoint", "b", "c"))
        sources, rate = ((a, b, c), Column("c", "learning_rate")) if self._maybe(0.7) else ((a, b), number(0.5))
        score = product(rate, self._score(self._vector("a", 0.1), self._vector("b", 0.1)))
        keys = self._pick([("sample_id",), ("sample_id",), ("checkpoint",), ("sample_id", "checkpoint"), ()])
        return self._grouped(sources, tuple(Column("a", key) for key in keys), [("score", self._aggregate(score, 0.6))])

    def means_over_checkpoints(self) -> Select:
        """TracIn with one mean for each checkpoint."""
        b = self._split("b", "validation")
        columns = (("checkpoint", Column("b", "checkpoint")), ("mean", Aggregate("avg", self._vector("b", 0.1))))
        mean = Select((b,), columns, keys=(Column("b", "checkpoint"),))
        m = Source("m", mean, None, "inner", self._equal("checkpoint", "a", "m"))
        c = Source("c", "checkpoints", None, "inner", self._equal("checkpoint", "a", "c"))
        score = product(Column("c", "learning_rate"), inner_product(self._vector("a", 0.1), Column("m", "mean")))
        columns = [("score", self._aggregate(score, 0.6))]
        return self._grouped((self._split("a", "train"), m, c), (Column("a", "sample_id"),), columns)

    def over_layers(self) -> Select:
        """Layer by layer, joined with the relation of layers."""
        t, v = self._side("t", "train", 0.3), self._side("v", self._query_relation(), 0.3)
        where = Op("<>", Column("l", "layer"), Constant("fc1")) if self._maybe(0.3) else None
        sources = (t, v, Source("l", "layers", where))
        vectors = [self._vector("t", 0), self._vector("v", 0)]
        place = int(self._rng.integers(2))
        vectors[place] = Call("layers", (vectors[place], Column("l", "layer")))
        score = product(self._weight("t"), inner_product(*vectors))
        keys = self._pick(
            [(Column("t", "sample_id"),), (Column("l", "layer"),), (Column("l", "layer"), Column("t", "label"))]
        )
        return self._grouped(sources, keys, [("score", self._aggregate(score, 0.8))])

    def norms(self) -> Select:
        """Of samples, averaged; or of averages."""
        side = self._side("t", self._pick(["train", "validation"]), 0.4)
        of_samples = Aggregate(self._pick(["avg", "max"]), Call("norm", (self._vector("t"),)))
        of_mean = Call("norm", (Aggregate(self._pick(["avg", "sum"]), product(self._weight("t"), self._vector("t"))),))
        return self._grouped((side,), self._train_keys(), [("score", self._pick([of_samples, of_mean]))])

    def with_users_table(self) -> Select:
        """Weighted and tied by a table of the user's own."""
        e = Source("e", self._pick(["extra", "frame"]), None, "inner", self._equal("sample_id", "t", "e"))
        sources = (self._side("t", "train", 0.3), e, self._side("v", self._query_relation(), 0.3))
        score = product(Column("e", "bonus"), self._score(self._vector("t"), self._vector("v")))
        key = self._pick([Column("t", "sample_id"), Column("e", "note"), Column("e", "sample_id")])
        return self._grouped(sources, (key,), [("score", self._aggregate(score))])

    def three_sides(self) -> Select:
        """Pairs of one side with each of two others, or of these: sums count every row of the third."""
        relations = [self._pick(["train", "validation"]) for _ in range(3)]
        sources = tuple(self._side(name, relation, 0.5) for name, relation in zip("abc", relations, strict=True))
        pairs = [self._pick([("a", "b"), ("a", "c"), ("b", "c")]) for _ in range(self._pick([1, 2]))]
        scores = [
            (name, self._aggregate(product(self._weight("c"), self._score(*(self._vector(one, 0.1) for one in pair)))))
            for name, pair in zip(("score", "other"), pairs, strict=False)
        ]
        keys = self._pick([(Column("a", "sample_id"),), (Column("b", "label"),), ()])
        return self._grouped(sources, keys, scores)

    def with_metadata(self) -> Select:
        """From the relations that the views are made of, tied by ids and splits."""
        g = self._split("g", "train")
        on = all_of(*(self._equal(name, "g", "o") for name in ("sample_id", "split", "checkpoint")))
        o = Source("o", "outputs", Op("<", Column("o", "loss"), number(1.7)) if self._maybe(0.3) else None, "inner", on)
        tied = all_of(self._equal("sample_id", "g", "s"), self._equal("split", "g", "s"))
        s = Source("s", "samples", None, "inner", tied)
        weight = self._pick([None, Column("o", "loss"), Column("s", "label")])
        score = product(weight, self._score(self._vector("g", 0.1), self._vector("v")))
        keys = self._pick([(Column("s", "label"),), (Column("g", "sample_id"),), (Column("s", "sample_id"),), ()])
        v = self._side("v", self._query_relation(), 0.3)
        return self._grouped((g, o, s, v), keys, [("score", self._aggregate(score))])

    def outer_join(self) -> Select:
        """Rows without a partner stay."""
        on = all_of(self._pick([self._equal("label", "t", "v"), self._equal("sample_id", "t", "v")]), None)
        v = self._side("v", self._query_relation(), 0.3)
        v = Source("v", v.of, v.where, self._pick(["left", "left", "right", "full"]), on)
        score = self._weighted(self._score(self._vector("t", 0), self._vector("v", 0)), "tv")
        return self._grouped(
            (self._side("t", "train", 0.3), v), self._keys(), [("score", self._aggregate(score)), *self._others()]
        )

    def along_trajectory(self) -> Select:
        """Training samples at each step, times its learning rate, with the query side at a checkpoint."""
        a = Source("a", "gradients", IsNull(Column("a", "step"), negated=True))
        s = Source("s", "steps", None, "inner", self._equal("step", "a", "s"))
        score = product(Column("s", "learning_rate"), self._score(self._vector("a", 0.1), self._vector("v")))
        keys = self._pick([(Column("a", "sample_id"),), (Column("a", "step"),), ()])
        sources = (a, s, self._side("v", self._query_relation(), 0.3))
        return self._grouped(sources, keys, [("score", self._aggregate(score, 0.6))])
