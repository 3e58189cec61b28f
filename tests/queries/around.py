"""What stands around a query: conditions on its scores, windows, an order, a limit, or another query."""

from __future__ import annotations

import itertools
from typing import Any

from tests.queries.evaluate import Evaluator
from tests.queries.model import (
    Aggregate,
    Column,
    Constant,
    Op,
    Select,
    Source,
    Window,
)
from tests.queries.parts import Parts


class Around(Parts):
    """Adds to a query over one store, or leaves it as it is."""

    def finished(self, select: Select) -> Select:
        """With conditions on scores, windows, an order and a limit, or inside another query; often nothing of these."""
        ways = [self._having, self._window, self._ranked, self._limited, self._ordered, self._inside, self._aggregated]
        return self._pick(ways)(select) if self._maybe(0.5) else select

    def _having(self, select: Select) -> Select:
        if select.keys and self._maybe(0.3):
            return select.with_(having=Op(">", Aggregate("count", None), Constant(self._pick([1, 4]))))
        cut = self._gap(self._scores(select))
        if cut is None or select.keys is None:
            return select
        return select.with_(having=Op(self._pick("<>"), dict(select.columns)["score"], Constant(cut)))

    def _window(self, select: Select) -> Select:
        first = select.columns[0]
        partition = self._pick([(), (first[1],)]) if first[0] == "k0" else ()
        window = Window(self._pick(["sum", "avg", "count"]), dict(select.columns)["score"], partition)
        return select.with_(columns=(*select.columns, ("over_all", window)))

    def _ranked(self, select: Select) -> Select:
        """With a rank, or its first ranks only; not where scores are as good as equal."""
        scores = sorted(score for score in self._scores(select) if score is not None)
        if any(b - a < 1e-3 * max(1, abs(a)) for a, b in itertools.pairwise(scores)):
            return select
        rank = Window("rank", None, (), dict(select.columns)["score"])
        if self._maybe(0.5):
            return select.with_(qualify=Op("<=", rank, Constant(3)))
        return select.with_(columns=(*select.columns, ("place", rank)))

    def _ordered(self, select: Select) -> Select:
        return select.with_(order=((self._pick([name for name, _ in select.columns]), self._maybe(0.5)),))

    def _limited(self, select: Select) -> Select:
        """The first few, where it is clear which these are."""
        descending = self._maybe(0.5)
        scores = [score for score in self._scores(select) if score is not None]
        scores.sort(reverse=descending)
        cuts = [k for k in range(1, len(scores)) if abs(scores[k] - scores[k - 1]) > 1e-3 * max(1, abs(scores[k]))]
        if not cuts:
            return select
        end, offset = self._pick(cuts), self._pick([0, 0, *cuts])
        if offset >= end:
            offset = 0
        return select.with_(order=(("score", descending),), limit=end - offset, offset=offset)

    def _inside(self, select: Select) -> Select:
        """All its columns once more, from outside; perhaps tied to a table of the user's."""
        columns = tuple((f"o_{name}", Column("q", name)) for name, _ in select.columns)
        sources: tuple[Source, ...] = (Source("q", select),)
        if (
            select.columns[0][0] == "k0"
            and isinstance(select.columns[0][1], Column)
            and select.columns[0][1].name == "sample_id"
        ):
            on = Op("=", Column("q", "k0"), Column("u", "sample_id"))
            sources = (*sources, Source("u", self._pick(["extra", "frame"]), None, "inner", on))
            columns = (*columns, ("bonus", Op("*", Column("u", "bonus"), Column("q", "score"))))
        return Select(sources, columns, distinct=self._maybe(0.1) and len(sources) == 1)

    def _aggregated(self, select: Select) -> Select:
        """One row about all the scores."""
        score = Column("q", "score")
        columns = (
            ("rows", Aggregate("count", None)),
            ("total", Aggregate("sum", score)),
            ("top", Aggregate("max", score)),
        )
        return Select((Source("q", select),), columns, keys=())

    def _scores(self, select: Select) -> list[Any]:
        place = [name for name, _ in select.columns].index("score")
        return [row[place] for row in Evaluator(self._store).rows(select)]

    def _gap(self, scores: list[Any]) -> float | None:
        """A number that is clearly between two of them."""
        known = sorted({score for score in scores if score is not None})
        gaps = [(a + b) / 2 for a, b in itertools.pairwise(known) if b - a > 0.01 * max(1, abs(a), abs(b))]
        return round(float(self._pick(gaps)), 4) if gaps else None
