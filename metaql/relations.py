"""The relations that SQL sees, in an attached in-memory database of their own.

The user's database, which may be a file, never holds anything of ours.
"""

from __future__ import annotations

from typing import Any

import duckdb
import pyarrow as pa

from metaql.errors import QueryError
from metaql.storage import tables
from metaql.storage.store import Store
from metaql.storage.tables import RELATIONS
from metaql.udfs.embedding import EMBEDDING, LOGITS, SHAPE
from metaql.udfs.hydra_weights import HYDRA_WEIGHTS
from metaql.udfs.precondition import DEFINITION as PRECONDITION
from metaql.udfs.quoting import literal, quoted
from metaql.udfs.references import GRADIENT
from metaql.udfs.register import TABLE_FUNCTIONS

ROW = "metaql_row"


def create_relations(connection: duckdb.DuckDBPyConnection, store: Store, database: str) -> list[str]:
    """Attaches a database of that name, which must be free, with the store's relations, and a view for each split.

    Returns what the user should be warned of.
    """
    connection.execute(f"ATTACH ':memory:' AS {quoted(database)}")
    try:
        return _create(connection, store, database)
    except BaseException:
        connection.execute(f"DETACH {quoted(database)}")
        raise


def create_short_forms(connection: duckdb.DuckDBPyConnection, store: Store, database: str) -> None:
    """Macros over the functions that return SQL, which must be there, in a database made by ``create_relations``."""
    relations = ", ".join(map(literal, (*RELATIONS, *_named_splits(store))))
    place = f"{quoted(database)}.main"
    connection.execute(f"CREATE MACRO {place}.{PRECONDITION}")
    for function in TABLE_FUNCTIONS:
        given = ", ".join(f"{name} := {_written(value)}" for name, value in function.defaults.items())
        arguments = (
            f"{literal(database)}, [{relations}], current_setting('search_path'), {', '.join(function.defaults)}"
        )
        connection.execute(
            f"CREATE MACRO {place}.{function.name}({given}) AS TABLE FROM query(metaql_{function.name}({arguments}))"
        )


def _written(value: Any) -> str:
    """A default as SQL."""
    if value is None:
        return "NULL"
    return literal(value) if isinstance(value, str) else repr(value)


def free_name(connection: duckdb.DuckDBPyConnection, name: str) -> str:
    """The name, with a number behind it if a database or a schema of that name is there already."""
    taken = _taken(connection)
    number, candidate = 1, name
    while candidate.lower() in taken:
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def require_free(connection: duckdb.DuckDBPyConnection, name: str) -> None:
    """QueryError when a database or a schema of that name is there already."""
    if name.lower() in _taken(connection):
        raise QueryError(
            f"there is a database or schema {name!r} on this connection already: pass another schema= to metaql.load"
        )


def _taken(connection: duckdb.DuckDBPyConnection) -> set[str]:
    names = connection.execute(
        "SELECT database_name FROM duckdb_databases() UNION ALL SELECT schema_name FROM duckdb_schemas()"
    ).fetchall()
    return {name.lower() for (name,) in names}


def _create(connection: duckdb.DuckDBPyConnection, store: Store, name: str) -> list[str]:
    """Tables keep the rows' numbers; views make gradients of them, whose other parts are constants."""
    database = quoted(name)
    connection.execute(f"CREATE SCHEMA {database}.stored")
    for relation in ("samples", "checkpoints", "steps", "layers", "curvature"):
        _table(connection, f"{database}.main.{relation}", getattr(tables, relation)(store))
    _table(connection, f"{database}.stored.rows", tables.rows(store))
    for relation, values in (("gradients", _gradient(store, "row")), ("outputs", _outputs(store))):
        connection.execute(
            f"CREATE VIEW {database}.main.{relation} AS SELECT sample_id, split, checkpoint, step, {values}"
            f" FROM {database}.stored.rows"
        )
    _create_embeddings(connection, store, database)
    connection.execute(
        f"CREATE VIEW {database}.main.hydra_weights AS"
        f" SELECT unnest({HYDRA_WEIGHTS}({literal(name)}, checkpoint), recursive := true)"
        f" FROM (SELECT max(checkpoint) AS checkpoint FROM {database}.main.checkpoints)"
    )
    newest, named = _newest_checkpoints(store), _named_splits(store)
    for split, checkpoint in named.items():
        _create_split(connection, store, database, split, checkpoint)
    return [_unnamed(split) for split in newest if split not in named] + _differences(newest)


def _table(connection: duckdb.DuckDBPyConnection, name: str, table: pa.Table) -> None:
    connection.from_arrow(table).create(name)


def _gradient(store: Store, column: str) -> str:
    return f"struct_pack(store := {store.id}::BIGINT, \"row\" := {quoted(column)}, layers := '') AS gradient"


def _outputs(store: Store) -> str:
    """The columns beside the keys; ``logits``, which are read when a query looks at them, if any are kept."""
    kept = any(one.logits for one in store.manifest.collections)
    logits = f', {LOGITS}({store.id}::BIGINT, "row") AS logits' if kept else ""
    return f"loss, prediction, confidence{logits}"


def _create_embeddings(connection: duckdb.DuckDBPyConnection, store: Store, database: str) -> None:
    """A view that knows which rows have an embedding of which layer, and reads those that a query looks at."""
    _table(connection, f"{database}.stored.embeddings", tables.embeddings(store))
    place = f'{store.id}::BIGINT, layer, "row"'
    connection.execute(
        f"CREATE VIEW {database}.main.embeddings AS SELECT sample_id, split, checkpoint, layer,"
        f" {SHAPE}({place}) AS shape, {EMBEDDING}({place}) AS embedding"
        f" FROM {database}.stored.rows JOIN {database}.stored.embeddings USING (collection)"
    )


def _newest_checkpoints(store: Store) -> dict[str, int | None]:
    """Each split's newest checkpoint; None for one that was recorded along a trajectory only."""
    newest: dict[str, int | None] = {}
    for collection in store.manifest.collections:
        before = newest.setdefault(collection.split, None)
        if collection.checkpoint is not None:
            newest[collection.split] = max(before or 0, collection.checkpoint)
    return newest


def _named_splits(store: Store) -> dict[str, int | None]:
    """The newest checkpoints of the splits that have a view of their name."""
    return {name: newest for name, newest in _newest_checkpoints(store).items() if name.lower() not in RELATIONS}


def _create_split(
    connection: duckdb.DuckDBPyConnection, store: Store, database: str, split: str, checkpoint: int | None
) -> None:
    """A table in the order of the rows, which lie one after another in the store, and the view on it.

    Along a trajectory a sample has a gradient for each step, and none that would be *the* one: NULL.
    """
    name, text = quoted(split), literal(split)
    # Not the split's own name: DuckDB proposes names that resemble a mistyped one.
    stored = f"{database}.stored.{quoted(f'rows of {split}')}"
    if checkpoint is None:
        rows = f"(SELECT sample_id, NULL::BIGINT AS {ROW}, NULL::DOUBLE AS loss, NULL::BIGINT AS prediction,"
        rows += f" NULL::FLOAT AS confidence FROM {database}.main.samples WHERE split = {text})"
    else:
        rows = f'(SELECT sample_id, "row" AS {ROW}, loss, prediction, confidence FROM {database}.stored.rows'
        rows += f" WHERE split = {text} AND checkpoint = {checkpoint})"
    gradient = f"NULL::{GRADIENT} AS gradient" if checkpoint is None else _gradient(store, ROW)
    connection.execute(
        f"CREATE TABLE {stored} AS SELECT s.*, o.* EXCLUDE (sample_id) FROM {rows} o"
        f" JOIN {database}.main.samples s ON s.sample_id = o.sample_id AND s.split = {text} ORDER BY o.{ROW};"
        f" CREATE VIEW {database}.main.{name} AS SELECT * EXCLUDE ({ROW}), {gradient} FROM {stored}"
    )


def _unnamed(split: str) -> str:
    return (
        f"the split '{split}' has the name of a relation, so there is no view of that name for it: use gradients,"
        f" outputs and samples with split = '{split}'"
    )


def _differences(newest: dict[str, int | None]) -> list[str]:
    collected = {split: checkpoint for split, checkpoint in newest.items() if checkpoint is not None}
    if len(set(collected.values())) < 2:
        return []
    said = ", ".join(f"{split} at {checkpoint}" for split, checkpoint in collected.items())
    return [
        f"the splits were last collected at different checkpoints ({said}), and so are the views of their names:"
        " scores between them mix weights. Use gradients with one checkpoint, or collect what is missing"
    ]
