"""Draws random queries about single pairs: those that are scored in tiles when there are many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from metaql import pair_shape, pairs

# The user's own tables, with gradients that are NULL, and with no row.
_HOLES = "REPLACE (CASE WHEN sample_id % 4 <> 1 THEN gradient END AS gradient)"
TABLES = (
    f"CREATE TABLE holes AS SELECT * {_HOLES} FROM train",
    f"CREATE TABLE gaps AS SELECT * {_HOLES} FROM validation",
    "CREATE TABLE nobody AS SELECT * FROM validation LIMIT 0",
    "CREATE VIEW hard AS SELECT * FROM train WHERE loss > 0.6",
)


def plan_tiles(patch: pytest.MonkeyPatch) -> None:
    """Few pairs are planned as if they were many, with lists so short that there are several."""
    patch.setattr(pair_shape, "FEWEST_PAIRS", 0)
    patch.setattr(pair_shape, "FEWEST_MEMBERS", 0)
    patch.setattr(pairs, "LIST", 3)


@dataclass(frozen=True)
class Drawn:
    """A query. Where ties may be broken either way, only the columns ``decided`` are sure, and each row is one of
    ``every``.

    ``ordered`` is the place of a column that the rows come sorted by, as they stand.
    """

    text: str
    decided: tuple[int, ...] | None = None
    every: str | None = None
    ordered: int | None = None


class Draw:
    """Random queries; the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def query(self) -> Drawn:
        shapes: list[tuple[int, Callable[[], Drawn]]] = [
            (3, self._rows),
            (3, self._groups),
            (5, self._first_of_each),
            (4, self._top),
            (2, self._ranks),
            (2, self._windows),
            (2, self._nested),
            (1, self._filtered),
            (1, self._distinct),
        ]
        weights = np.array([weight for weight, _ in shapes])
        return shapes[int(self._rng.choice(len(shapes), p=weights / weights.sum()))][1]()

    def _rows(self) -> Drawn:
        """All pairs, with one score or several."""
        scores = [self._score(), *([self._score(), "abs(" + self._score() + ")"] if self._maybe(0.3) else [])]
        columns = [*self._columns(), *(f"{one} AS s{place}" for place, one in enumerate(scores))]
        order = f" ORDER BY {self._pick(['1, 2', 's0 DESC, 1, 2', 'ALL'])}" if self._maybe(0.3) else ""
        return Drawn(f"SELECT {', '.join(columns)} {self._pairs()}{order}")

    def _groups(self) -> Drawn:
        """Aggregates that no rule takes apart."""
        score = self._score()
        calls = [
            f"max({score})",
            f"min({score})",
            f"median({score})",
            f"count(DISTINCT {score})",
            f"avg({score}) FILTER (WHERE {score} > 0)",
            f"arg_max(v.sample_id * 100 + t.sample_id, ({score}, v.sample_id, t.sample_id))",
            f"max({score} * v.loss - t.loss)",
        ]
        chosen = [self._pick(calls) for _ in range(2)]
        keys = self._pick(["t.sample_id", "v.sample_id", "t.label", "v.label, t.label", "t.sample_id % 3", ""])
        having = f" HAVING max({score}) > 0" if keys and self._maybe(0.2) else ""
        columns = [*([keys] if keys else []), *chosen, "count(*)"]
        return Drawn(f"SELECT {', '.join(columns)} {self._pairs()}{f' GROUP BY {keys}' if keys else ''}{having}")

    def _first_of_each(self) -> Drawn:
        """QUALIFY over a window that numbers or ranks pairs by their scores."""
        score, of, name = self._score(exact=True), self._pairs(), self._pick(["row_number", "row_number", "rank"])
        by = self._pick(["t.sample_id", "v.sample_id", "t.sample_id, t.loss", "v.label", "t.label, v.label", "", "1"])
        ordered, direction = self._pick(["s", score, "s"]), self._direction()
        breaks = ", v.sample_id, t.sample_id" if self._maybe(0.3) else ""
        window = f"{name}() OVER ({f'PARTITION BY {by} ' if by else ''}ORDER BY {ordered}{direction}{breaks})"
        bound = self._pick(["<= 2", "<= 3", "< 3", "= 1", "<= 100", "= 2"])
        extra = self._pick(["", "", "", " AND s > 0", " AND t.loss > 0.5"])
        chosen = f"SELECT t.sample_id, v.sample_id, t.label, v.label, t.loss, {score} AS s {of}"
        places = {"t.sample_id": (0,), "v.sample_id": (1,), "v.label": (3,), "t.label, v.label": (2, 3)}
        decided = (*places.get(by, (0,) if by.startswith("t.sample") else ()), 5)
        if name == "rank" or breaks:
            return Drawn(f"{chosen} QUALIFY {window} {bound}{extra}")
        if "t.loss" in extra:
            # Which of several equal ones is left is not decided, and so is its loss.
            extra = ""
        return Drawn(f"{chosen} QUALIFY {window} {bound}{extra}", decided, chosen)

    def _top(self) -> Drawn:
        """The first few of all."""
        score = self._score(exact=True)
        breaks = self._pick(["", "", ", t.sample_id, v.sample_id"])
        limit = f" LIMIT {self._pick([1, 2, 5, 40, 1000])}" + self._pick(["", "", " OFFSET 2", " OFFSET 30"])
        columns = ", ".join([*self._columns(), f"{score} AS s"])
        chosen = f"SELECT {columns} {self._pairs()}"
        text = f"{chosen} ORDER BY {self._pick(['s', score, 's'])}{self._direction()}{breaks}{limit}"
        place = len(self._columns())
        return Drawn(text, None, None, place) if breaks else Drawn(text, (place,), chosen, place)

    def _ranks(self) -> Drawn:
        """Windows that must see all pairs, whatever is left of these."""
        score = self._score(exact=True)
        rank = f"rank() OVER (PARTITION BY t.sample_id ORDER BY {score}{self._direction()})"
        other = self._pick(
            ["count(*) OVER (PARTITION BY v.sample_id)", "dense_rank() OVER (ORDER BY v.loss)", "max(s) OVER ()"]
        )
        qualify = self._pick(
            ["", f" QUALIFY {rank} <= 3", f" QUALIFY {rank} <= 2 AND {other} > 1", " QUALIFY place <= 3"]
        )
        columns = f"t.sample_id, v.sample_id, {score} AS s, {rank} AS place, {other} AS other"
        return Drawn(f"SELECT {columns} {self._pairs()}{qualify}")

    def _windows(self) -> Drawn:
        score = self._score(exact=True)
        over = self._pick(["", "PARTITION BY t.label", "PARTITION BY v.sample_id", "PARTITION BY s > 0"])
        window = f"{self._pick(['sum', 'max', 'count'])}(s) OVER ({over})"
        last = self._pick(["", f" QUALIFY {window} > 2", " QUALIFY s = max(s) OVER (PARTITION BY t.sample_id)"])
        return Drawn(f"SELECT t.sample_id, v.sample_id, {score} AS s, {window} AS o {self._pairs()}{last}")

    def _nested(self) -> Drawn:
        """Sub-queries that read a side, and pairs that are read by another query."""
        score, of = self._score(exact=True), self._pairs()
        columns = f"t.sample_id AS a, v.sample_id AS b, {score} AS s"
        inner = f"SELECT {columns} {of}"
        rank = "rank() OVER (PARTITION BY a ORDER BY s DESC)"
        tied = "x.a = y.a AND x.s = y.s AND x.b < y.b"
        worst = "(SELECT max(o.loss) FROM outputs o WHERE o.sample_id = t.sample_id)"
        alike = "(SELECT count(*) FROM samples x WHERE x.label = v.label)"
        best = f"(SELECT max({score}) FROM validation v WHERE v.label IS NOT NULL)"
        choices = [
            f"SELECT a, max(s), count(*) FROM ({inner}) GROUP BY a",
            f"SELECT * FROM ({inner}) WHERE s > 1 AND b < 6",
            f"SELECT * FROM ({inner}) QUALIFY {rank} <= 2",
            f"WITH p AS ({inner}) SELECT x.a, x.s, y.b FROM p x JOIN p y ON {tied}",
            f"SELECT {columns}, {worst} AS worst {of}",
            f"SELECT {columns}, {alike} AS alike {of}",
            f"SELECT {best} AS s FROM train t",
            f"SELECT t.sample_id, x.s FROM train t, LATERAL {best} x(s)",
            f"SELECT t.sample_id FROM hard t WHERE EXISTS (SELECT 1 FROM validation v WHERE {score} > 5)",
            f"{inner} UNION ALL {inner}",
            f"(FROM ({inner}) QUALIFY {rank} = 1) ORDER BY a, b",
        ]
        return Drawn(self._pick(choices))

    def _filtered(self) -> Drawn:
        """Products in conditions."""
        score = self._score(exact=True)
        other = self._pick([[], [f"{score} < 20"], [f"{score} * v.loss > t.loss"]])
        return Drawn(f"SELECT t.sample_id, v.sample_id, {score} AS s {self._pairs(f'{score} > 1', *other)}")

    def _distinct(self) -> Drawn:
        score = self._score(exact=True)
        return Drawn(
            self._pick(
                [
                    f"SELECT DISTINCT {score} AS s {self._pairs()}",
                    f"SELECT DISTINCT t.label, {score} AS s {self._pairs()} ORDER BY s DESC, 1 LIMIT 5",
                    f"SELECT DISTINCT t.sample_id, {score} AS s {self._pairs()}"
                    f" QUALIFY rank() OVER (PARTITION BY t.sample_id ORDER BY s) <= 2",
                ]
            )
        )

    def _columns(self) -> list[str]:
        return ["t.sample_id", "v.sample_id", "v.label", "t.loss"]

    def _direction(self) -> str:
        return str(self._pick(["", " DESC", " DESC", " ASC NULLS FIRST", " DESC NULLS FIRST", " NULLS LAST"]))

    def _score(self, exact: bool = False) -> str:
        """Products of whole numbers are exact, so that ties are ties in every order of addition."""
        t, v = (
            self._pick(["t.gradient", "layers(t.gradient, 'fc1')"]),
            self._pick(["v.gradient", "layers(v.gradient, 'fc1.bias')"]),
        )
        pair = ", ".join(self._rng.permutation([t, v]).tolist())
        if not exact and self._maybe(0.25):
            return f"cosine_similarity({pair})"
        return f"inner_product({pair})"

    def _pairs(self, *also: str) -> str:
        """FROM, with conditions."""
        left = self._pick(["train", "train", "train", "holes", "hard", "(SELECT * FROM train WHERE label IS NOT NULL)"])
        right = self._pick(
            ["validation", "validation", "validation", "gaps", "nobody", "(FROM validation WHERE loss < 1.7)"]
        )
        conditions = [
            "t.label = v.label",
            "t.label = v.label AND t.sample_id % 2 = v.sample_id % 2",
            "t.sample_id <> v.sample_id",
            "t.label IS NOT DISTINCT FROM v.label",
            "t.loss > 0.6",
            "v.loss > t.loss",
            "v.label = 1",
            "v.label + 1 = t.label",
            "t.sample_id IN (SELECT sample_id FROM outputs WHERE loss > 1)",
        ]
        chosen = [*also, *(self._pick(conditions) for _ in range(self._pick([0, 0, 1, 1, 2])))]
        items = [f"{left} t", f"{right} v"]
        if self._maybe(0.2):
            items.reverse()
        if self._maybe(0.15):
            items.append("checkpoints c")
            chosen.append("c.checkpoint = v.sample_id % 3")
        if chosen and self._maybe(0.3) and len(items) == 2:
            return f"FROM {items[0]} JOIN {items[1]} ON {' AND '.join(chosen)}"
        return f"FROM {', '.join(items)}" + (f" WHERE {' AND '.join(chosen)}" if chosen else "")

    def _pick(self, options: Sequence[Any]) -> Any:
        return options[int(self._rng.integers(len(options)))]

    def _maybe(self, chance: float) -> bool:
        return bool(self._rng.random() < chance)
