"""Prints a query of ``model`` as one of the many texts that mean it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
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
    Scalar,
    Select,
    Source,
    Window,
    everything,
    is_vector,
)

COMMUTATIVE = ("+", "*", "=", "<>", "AND", "OR")
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}
KEYWORDS = "SELECT FROM WHERE GROUP BY ORDER HAVING JOIN ON AS AND OR WITH LIMIT CASE WHEN THEN ELSE END CROSS INNER"
COMMENTS = ("/* FROM nowhere */", "-- it's a comment; SELECT\n", "/* avg(gradient) */", "/* a 'quote */")
IDENTIFIERS = {
    "t": ("t", "t", "tr", '"T"', '"left side"', "sample"),
    "v": ("v", "v", "val", "V", '"a ""quoted"" name"', "query_side"),
    "c": ("c", "ck", '"C"'),
}


class Spelling:
    """A way to say things, drawn at random; ``plain`` in [0, 1] is how rarely it is a fancy one.

    ``setup`` are statements to run before the text and ``teardown`` after it; ``parameters`` go with the text.
    """

    def __init__(self, rng: np.random.Generator, prefix: str, plain: float, parameters: bool = True) -> None:
        self._rng, self._prefix, self._plain = rng, prefix, plain
        self.setup: list[str] = []
        self.teardown: list[str] = []
        self._parameter_style = self._pick([None, None, "?", "$1", "$name"]) if parameters else None
        self._values: list[Any] = []
        self._order: list[int] = []
        self._fixed = 0
        self._count = 0
        self._identifiers: dict[str, str] = {}
        self._names: dict[str, str | None] = {}
        self._renamed: dict[tuple[str, str], str] = {}
        self._aliases: dict[Expr, str] = {}
        self._ctes: list[list[str]] = []

    def text(self, select: Select) -> str:
        """SQL for the query."""
        text = self._select(select)
        if self._maybe(0.15):
            text = re.sub(rf"\b({KEYWORDS.replace(' ', '|')})\b(?=[^']*(?:'[^']*'[^']*)*$)", _lower, text)
        if self._maybe(0.15):
            place = self._pick([found.end() for found in re.finditer(r" (?:FROM|from) ", text)] or [0])
            text = f"{text[:place]}{self._pick(COMMENTS)} {text[place:]}"
        return self._with_parameters(text)

    @property
    def parameters(self) -> Any:
        """What to hand over with the text; None when it has no parameters."""
        if not self._order:
            return None
        if self._parameter_style == "$name":
            return {f"p{place}": self._values[place] for place in self._order}
        return [self._values[place] for place in self._order]

    def _pick(self, options: Any) -> Any:
        options = list(options)
        return options[int(self._rng.integers(len(options)))]

    def _maybe(self, chance: float) -> bool:
        return bool(self._rng.random() < chance * (1 - self._plain))

    def _fresh(self, what: str) -> str:
        self._count += 1
        return f"{what}_{self._prefix}_{self._count}"

    # Statements

    def _select(self, select: Select) -> str:
        self._ctes.append([])
        aliases, self._aliases = self._aliases, {}
        sources, conditions = self._sources(select)
        self._aliases = {} if select.distinct else {e: n for n, e in select.columns if not isinstance(e, Column)}
        columns = ", ".join(self._column(name, expression) for name, expression in select.columns)
        clause = f"SELECT {'DISTINCT ' if select.distinct else ''}{columns}"
        start = f"FROM {sources} {clause}" if self._maybe(0.1) else f"{clause} FROM {sources}"
        rest = [*self._where(select, conditions), *self._group(select), *self._ending(select)]
        self._aliases = aliases
        ctes = self._ctes.pop()
        return " ".join([f"WITH {', '.join(ctes)}" if ctes else "", start, *rest]).strip()

    def _column(self, name: str, expression: Expr) -> str:
        with self._no_aliases():
            text = self._expression(expression)
        return f"{text} {name}" if self._maybe(0.1) else f"{text} AS {name}"

    def _where(self, select: Select, conditions: list[Expr]) -> Iterator[str]:
        with self._no_aliases():
            texts = [self._condition(one) for one in (*conditions, *([select.where] if select.where else []))]
        if texts:
            yield "WHERE " + " AND ".join(texts)

    def _group(self, select: Select) -> Iterator[str]:
        names = {expression: (place, name) for place, (name, expression) in enumerate(select.columns, 1)}
        if select.keys:
            plain = {e for _, e in select.columns if not any(isinstance(one, Aggregate | Window) for one in e.walk())}
            if plain == set(select.keys) and not _has_window(select) and self._maybe(0.3):
                yield "GROUP BY ALL"
            else:
                yield "GROUP BY " + ", ".join(self._key(key, names.get(key)) for key in select.keys)
        if select.having is not None:
            yield f"HAVING {self._condition(select.having)}"
        if select.qualify is not None:
            yield f"QUALIFY {self._condition(select.qualify)}"

    def _key(self, key: Expr, named: tuple[int, str] | None) -> str:
        if named is not None and self._maybe(0.5):
            return self._pick([str(named[0]), named[1]])
        with self._no_aliases():
            return self._expression(key)

    def _ending(self, select: Select) -> Iterator[str]:
        places = {name: (place, expression) for place, (name, expression) in enumerate(select.columns, 1)}
        orders = []
        for name, descending in select.order:
            place, expression = places[name]
            way = self._pick(["alias", "position", "expression"]) if self._maybe(1) and not select.distinct else "alias"
            with self._no_aliases():
                text = {"alias": name, "position": str(place)}.get(way) or self._expression(expression)
            orders.append(text + (" DESC" if descending else self._pick(["", " ASC"])))
        if orders:
            yield "ORDER BY " + ", ".join(orders)
        if select.limit is not None:
            yield f"LIMIT {select.limit}"
        if select.offset:
            yield f"OFFSET {select.offset}"

    @contextmanager
    def _no_aliases(self) -> Iterator[None]:
        aliases, self._aliases = self._aliases, {}
        yield
        self._aliases = aliases

    # FROM

    def _sources(self, select: Select) -> tuple[str, list[Expr]]:
        """The text behind FROM, and the conditions that are left for WHERE."""
        inner = all(source.join in ("cross", "inner") for source in select.sources)
        texts, left = [], []
        for source in select.sources:
            text, condition = self._source(source, select, inner)
            texts.append(text)
            left.append(condition)
        commas = all(source.join == "cross" or (inner and self._maybe(0.5)) for source in select.sources[1:])
        result, conditions = texts[0], [left[0]] if left[0] is not None else []
        commas = commas and self._maybe(0.7)
        for place, source in enumerate(select.sources[1:], 1):
            # A third source might find two columns of the name.
            using = self._using(source) if place == 1 else None
            joined, rest = self._join(source, texts[place], (left[place], conditions), commas, using)
            result, conditions = result + joined, rest
        return result, conditions

    def _join(
        self, source: Source, text: str, conditions: tuple[Expr | None, list[Expr]], commas: bool, using: str | None
    ) -> tuple[str, list[Expr]]:
        """The text of one join, and the conditions that it leaves for WHERE: its own, and earlier ones."""
        waiting = [*conditions[1], *([conditions[0]] if conditions[0] is not None else [])]
        if source.join in ("left", "right", "full"):
            assert source.on is not None
            return f" {source.join.upper()} JOIN {text} ON {self._condition(source.on)}", waiting
        on = [source.on] if source.on is not None else []
        if commas or (not on and self._maybe(0.5)):
            return (", " if commas else " CROSS JOIN ") + text, [*waiting, *on]
        if using and self._maybe(0.3):
            return f" JOIN {text} USING ({using})", waiting
        # DuckDB has no sub-queries in the condition of a lateral join.
        if waiting and not source.lateral and self._maybe(0.3):
            on, waiting = [*on, *waiting], []
        words = " AND ".join(self._condition(one) for one in on) or self._pick(["true", "1 = 1", "TRUE"])
        return f" {self._pick(['JOIN', 'INNER JOIN'])} {text} ON {words}", waiting

    def _using(self, source: Source) -> str | None:
        match source.on:
            case Op("=", Column(one, name), Column(other, second)) if name == second:
                printed = {self._renamed.get((one, name), name), self._renamed.get((other, name), name)}
                return name if printed == {name} else None
        return None

    def _source(self, source: Source, select: Select, inner: bool) -> tuple[str, Expr | None]:
        """What stands for the source in FROM, and its own condition if that is not in there."""
        self._renamed = {key: name for key, name in self._renamed.items() if key[0] != source.name}
        if isinstance(source.of, Select):
            text, condition = self._sub_query(source, source.of), source.where
            if condition is not None and not inner:
                name = self._fresh("s")
                self._names[source.name] = name
                text = f"(SELECT * FROM {text} {name} WHERE {self._condition(condition)})"
                condition = None
            self._name(source)
            return f"{text} {self._names[source.name]}", condition
        if (source.where is None or inner) and not self._maybe(0.4):
            return self._plain_source(source, source.of, select), source.where
        text = self._filtered(source, source.of, _columns_of(source.name, select))
        self._name(source)
        return self._placed(text) + f" {self._names[source.name]}", None

    def _plain_source(self, source: Source, relation: str, select: Select) -> str:
        once = sum(one.of == relation for one in select.sources) == 1
        if once and relation.isalpha() and self._maybe(0.15) and source.name not in self._identifiers:
            self._identifiers[source.name] = relation
            self._names[source.name] = relation
            return relation
        self._name(source)
        return f"{_quoted(relation)} {self._pick(['', '', 'AS '])}{self._names[source.name]}"

    def _name(self, source: Source) -> None:
        if source.name not in self._identifiers:
            options = IDENTIFIERS.get(source.name, (source.name,))
            self._identifiers[source.name] = self._pick(options) if self._maybe(0.4) else source.name
        self._names[source.name] = self._identifiers[source.name]

    def _filtered(self, source: Source, relation: str, used: list[str]) -> str:
        """A SELECT of a relation's rows, with its condition inside; perhaps under other names."""
        # A sub-query in the condition may have a column of the same name.
        simple = source.where is None or not any(isinstance(one, Exists | In) for one in source.where.walk())
        self._names[source.name] = None if simple and self._maybe(0.5) else "x"
        with self._no_aliases():
            where = f" WHERE {self._condition(source.where)}" if source.where is not None else ""
        table = f"{_quoted(relation)} x"
        if self._maybe(0.4):
            for name in used:
                names = [f"{source.name}_{name}", name, f'"{name} of {source.name}"']
                self._renamed[source.name, name] = self._pick(names)
            columns = ", ".join(f"{name} AS {self._renamed[source.name, name]}" for name in used) or "1 AS one"
            return f"SELECT {columns} FROM {table}{where}"
        return self._pick([f"SELECT * FROM {table}{where}", f"FROM {table}{where}", f"SELECT x.* FROM {table}{where}"])

    def _sub_query(self, source: Source, select: Select) -> str:
        if source.lateral:
            return f"{self._pick(['LATERAL ', ''])}({self._select(select)})"
        if not _is_closed(select):
            return f"({self._select(select)})"
        if self._maybe(0.3):
            name = self._fresh("view")
            with self._literal():
                self._create(name, self._select(select))
            return name
        return self._placed(self._select(select))

    def _placed(self, text: str) -> str:
        """A query's text as something to select from."""
        if "\x01" not in text and self._maybe(0.15):
            name = self._fresh("view")
            self._create(name, text)
            return name
        if self._maybe(0.3):
            name = self._fresh("cte")
            self._ctes[-1].append(f"{name} AS {self._pick(['', '', 'MATERIALIZED ', 'NOT MATERIALIZED '])}({text})")
            return name
        return f"(SELECT * FROM ({text}) deep)" if self._maybe(0.15) else f"({text})"

    def _create(self, name: str, text: str) -> None:
        self.setup.append(f"CREATE VIEW {name} AS {text}")
        self.teardown.insert(0, f"DROP VIEW {name}")

    # Expressions

    def _condition(self, condition: Expr) -> str:
        match condition:
            case Op("AND", left, right):
                return f"{self._condition(left)} AND {self._condition(right)}"
            case Op("OR", _, _):
                return f"({self._expression(condition)})"
        return self._expression(condition)

    def _expression(self, expression: Expr) -> str:
        if expression in self._aliases and self._maybe(0.5):
            return self._aliases[expression]
        return str(getattr(self, f"_{type(expression).__name__.lower()}_text")(expression))

    def _column_text(self, column: Column) -> str:
        name = self._renamed.get((column.source, column.name), column.name)
        source = self._names[column.source]
        unique = name.startswith((f"{column.source}_", '"'))
        if source is None:
            return column.name
        return name if unique and self._maybe(0.5) else f"{source}.{name}"

    def _constant_text(self, constant: Constant) -> str:
        value = constant.value
        if constant.free and self._parameter_style and not self._fixed:
            self._values.append(value)
            return f"\x01{len(self._values) - 1}\x01"
        if value is None or isinstance(value, bool):
            return "NULL" if value is None else str(value).lower()
        return "'" + value.replace("'", "''") + "'" if isinstance(value, str) else str(value)

    def _op_text(self, op: Op) -> str:
        left, right, sign = self._operand(op.left), self._operand(op.right), op.op
        if sign in COMMUTATIVE and self._maybe(0.2):
            left, right = right, left
        elif sign in FLIPPED and self._maybe(0.2):
            left, right, sign = right, left, FLIPPED[sign]
        return f"{left} {sign} {right}"

    def _operand(self, expression: Expr) -> str:
        text = self._expression(expression)
        return f"({text})" if isinstance(expression, Op | Negative | IsNull | In) and "(" + text != text else text

    def _negative_text(self, negative: Negative) -> str:
        value = self._operand(negative.value)
        return f"(-{value})" if self._maybe(0.7) else f"(-1 * {value})"

    def _isnull_text(self, test: IsNull) -> str:
        return f"{self._operand(test.value)} IS {'NOT ' if test.negated else ''}NULL"

    def _case_text(self, case: Case) -> str:
        otherwise = f" ELSE {self._expression(case.otherwise)}" if case.otherwise is not None else ""
        return f"CASE WHEN {self._expression(case.condition)} THEN {self._expression(case.value)}{otherwise} END"

    def _call_text(self, call: Call) -> str:
        arguments = [self._expression(one) for one in call.arguments]
        if call.name in ("inner_product", "cosine_similarity") and self._maybe(0.3):
            arguments.reverse()
        return f"{self._cased(call.name)}({', '.join(arguments)})"

    def _aggregate_text(self, aggregate: Aggregate) -> str:
        if aggregate.name != "avg" or is_vector(aggregate.argument):
            return self._plain_aggregate(aggregate.name, aggregate)
        way = self._pick(["mean", "ratio", "times", "brackets"]) if self._maybe(0.3) else "avg"
        if way == "ratio":
            return "({} / {})".format(*(self._plain_aggregate(name, aggregate) for name in ("sum", "count")))
        average = self._plain_aggregate("mean" if way == "mean" else "avg", aggregate)
        return {"times": f"({average} * 1.0)", "brackets": f"({average})"}.get(way, average)

    def _plain_aggregate(self, name: str, aggregate: Aggregate) -> str:
        with self._no_aliases():
            argument = "*" if aggregate.argument is None else self._expression(aggregate.argument)
            where = f" FILTER (WHERE {self._condition(aggregate.where)})" if aggregate.where is not None else ""
        return f"{self._cased(name)}({'DISTINCT ' if aggregate.distinct else ''}{argument}){where}"

    def _window_text(self, window: Window) -> str:
        argument = (
            "" if window.name == "rank" else "*" if window.argument is None else self._expression(window.argument)
        )
        parts = []
        if window.partition:
            parts.append("PARTITION BY " + ", ".join(self._expression(one) for one in window.partition))
        if window.order is not None:
            parts.append(f"ORDER BY {self._expression(window.order)}")
        return f"{window.name}({argument}) OVER ({' '.join(parts)})"

    def _scalar_text(self, scalar: Scalar) -> str:
        return f"({self._select(scalar.select)})"

    def _exists_text(self, exists: Exists) -> str:
        return f"EXISTS ({self._select(exists.select)})"

    def _in_text(self, test: In) -> str:
        return f"{self._operand(test.value)} IN ({self._select(test.select)})"

    def _cased(self, name: str) -> str:
        return name.upper() if self._maybe(0.1) else name

    # Parameters

    @contextmanager
    def _literal(self) -> Iterator[None]:
        self._fixed += 1
        yield
        self._fixed -= 1

    def _with_parameters(self, text: str) -> str:
        """The marks become parameters, numbered in the order of the text."""

        def named(found: re.Match[str]) -> str:
            self._order.append(int(found[1]))
            styles = {"?": "?", "$1": f"${len(self._order)}", "$name": f"$p{found[1]}"}
            return styles[str(self._parameter_style)]

        return re.sub("\x01(\\d+)\x01", named, text)


def _lower(found: re.Match[str]) -> str:
    return found[0].lower()


def _quoted(relation: str) -> str:
    return relation if relation.replace("_", "").isalnum() else f'"{relation}"'


def _has_window(select: Select) -> bool:
    columns = any(isinstance(one, Window) for _, expression in select.columns for one in expression.walk())
    return columns or select.qualify is not None


def _is_closed(select: Select) -> bool:
    """Whether it reads none but its own sources."""
    read = {one.source for one in everything(select) if isinstance(one, Column)}
    return read <= set(_own_sources(select))


def _own_sources(select: Select) -> Iterator[str]:
    for source in select.sources:
        yield source.name
        if isinstance(source.of, Select):
            yield from _own_sources(source.of)
    for one in everything(select):
        if isinstance(one, Scalar | Exists | In):
            yield from _own_sources(one.select)


def _columns_of(source: str, select: Select) -> list[str]:
    """The columns of a source that anything in the select reads."""
    found: dict[str, None] = {}
    for one in everything(select):
        if isinstance(one, Column) and one.source == source:
            found[one.name] = None
    return list(found)
