"""The DuckDB that a query will run in, as the planner asks it."""

from __future__ import annotations

import re
from typing import Any

from metaql.execute import Executor
from metaql.parse import mentions_gradients, words


class GradientViews:
    """The user's own views that have to do with gradients, themselves or through other views."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._changes = -1
        self._views: dict[str, str] = {}
        self._words = words()

    def definitions(self) -> dict[str, str]:
        """Their CREATE statements, by name in lower case."""
        self._refresh()
        return self._views

    def words(self) -> re.Pattern[str]:
        """What a text must mention to have to do with gradients."""
        self._refresh()
        return self._words

    def _refresh(self) -> None:
        # DuckDB takes a millisecond to list its views, and the first time seven.
        if self._changes == self._executor.changes:
            return
        self._changes = self._executor.changes
        every, found = dict(self._executor.views()), set[str]()
        pattern = words()
        while more := {name for name, sql in every.items() if name not in found and mentions_gradients(sql, pattern)}:
            found |= more
            pattern = words(sorted(found))
        self._views, self._words = {name: every[name] for name in found}, pattern


class QueryDatabase:
    """The connection's DuckDB, seen from where a query stands in the user's program."""

    def __init__(self, executor: Executor, views: GradientViews, frame: Any) -> None:
        self._executor, self._views = executor, views
        self._call, self.is_relation = executor.caller(frame)

    def describe(self, query: str) -> list[tuple[str, str]]:
        """Names and types of a query's columns; runs nothing."""
        relation = self._call(query)
        return list(zip(relation.columns, map(str, relation.types), strict=True))

    def answer(self, query: str) -> list[tuple[Any, ...]]:
        """A query's rows."""
        rows: list[tuple[Any, ...]] = self._call(query).fetchall()
        return rows

    def is_scalar(self, name: str) -> bool:
        """Whether a function of this name, in lower case, is surely no aggregate."""
        return self._executor.is_scalar(name)

    def views(self) -> dict[str, str]:
        """The user's own views that have to do with gradients."""
        return self._views.definitions()

    @property
    def own(self) -> tuple[tuple[str, str], ...] | None:
        """The databases and schemas that names are looked up in first; None where that is not certain."""
        return self._executor.own_schemas
