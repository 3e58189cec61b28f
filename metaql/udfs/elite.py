"""``elite(data, labelled, …, save_as)``: how anomalous each row is, learned from polluted rows and a few labels."""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from typing import Any

from metaql.errors import QueryError
from metaql.methods.elite import Settings
from metaql.udfs.elite_fit import COLUMNS, FIT, require_savable, settings_of
from metaql.udfs.labelled_rows import IS_ANOMALY, SAMPLE_ID
from metaql.udfs.quoting import literal
from metaql.udfs.table_functions import Asked, Given, TableFunction

# What elite takes beside the rows: how to train, under the settings' own names, and where to keep the model.
_DEFAULTS = {**{each.name: each.default for each in fields(Settings)}, "save_as": None}
_CALL = make_dataclass(
    "_CALL",
    [("data", Any, None), ("labelled", Any, None), *((name, Any, value) for name, value in _DEFAULTS.items())],
    frozen=True,
)


def _sql(asked: Asked) -> str:
    """The rows as one list in an order of their own, so that the same rows train the same model.

    The relations are called after the arguments, which DuckDB's errors then name.
    """
    for argument in ("data", "labelled"):
        _require_columns(asked, argument)
    given = {name: getattr(asked.call, name) for name in _DEFAULTS}
    if not any(isinstance(value, Given) for value in given.values()):
        settings_of(given)
        require_savable(asked.source.store.path, given["save_as"])
    settings = ", ".join(f"'{name}': {_written(value)}" for name, value in given.items())
    data, labelled = '"elite(data)"', '"elite(labelled)"'
    labels = "NULL"
    if asked.call.labelled is not None:
        relation = asked.relation("labelled", "features and is_anomaly")
        labels = f"(SELECT list({labelled} ORDER BY hash({labelled})) FROM {relation} AS {labelled})"
    return (
        "SELECT unnest([found.sample_id for found in given]) AS sample_id, unnest(fitted, recursive := true) FROM"
        f" (SELECT given, {FIT}({literal(asked.source.name)}, {{{settings}}}, id_type, given, {labels}) AS fitted FROM"
        f" (SELECT list({data} ORDER BY {data}.sample_id, hash({data})) AS given,"
        f" any_value(typeof({data}.sample_id)) AS id_type"
        f" FROM {asked.relation('data', 'sample_id and features')} AS {data}))"
    )


def _require_columns(asked: Asked, argument: str) -> None:
    """QueryError for a relation that lacks a column which says what its rows are, where its columns are known."""
    names = asked.columns.get(argument)
    needed = SAMPLE_ID if argument == "data" else IS_ANOMALY
    if names is None or needed in (name.lower() for name in names):
        return
    how = {
        SAMPLE_ID: "it says which row a score belongs to, so name one: SELECT …, row_number() OVER () AS sample_id",
        IS_ANOMALY: "add one that is TRUE for an anomaly, FALSE for a normal row, NULL where it is not known",
    }[needed]
    raise QueryError(f"elite({argument}): there is no column {needed} among {', '.join(names)}: {how}")


def _written(value: Any) -> str:
    if isinstance(value, Given):
        return value.sql
    if value is None:
        return "NULL"
    return literal(value) if isinstance(value, str) else str(value)


ELITE = TableFunction("elite", COLUMNS, _CALL, _sql, relations=("data", "labelled"))
