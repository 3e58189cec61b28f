"""The relations of a store as Arrow tables: everything but the gradients themselves.

Whole columns at a time; a million rows take well under a second.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metaql.methods.damping import SHARE
from metaql.storage.arrow_arrays import as_numpy, column, empty, primitive, repeated
from metaql.storage.forms import FLOAT_BYTES, prefix_width, suffix_bytes
from metaql.storage.manifest import Collection, Segment
from metaql.storage.row_writer import ROW_SCHEMA
from metaql.storage.schema import FULL, Layer, parts, stored_parts
from metaql.storage.store import Store

# The names that every store has in SQL; a split can't have one of them.
RELATIONS = (
    "samples",
    "checkpoints",
    "steps",
    "layers",
    "curvature",
    "gradients",
    "outputs",
    "embeddings",
    "hydra_weights",
)
_KEYS = pa.schema([("row", pa.int64()), ("sample_id", pa.int64()), ("split", pa.string())])
_MOMENT = pa.schema([("checkpoint", pa.int64()), ("step", pa.int64())])
_OUTPUTS = pa.schema([ROW_SCHEMA.field(name).with_nullable(True) for name in ("loss", "prediction", "confidence")])
STEPS = pa.schema(
    [
        ("step", pa.int64()),
        ("parameter_group", pa.int64()),
        ("epoch", pa.int64()),
        ("learning_rate", pa.float64()),
        ("momentum", pa.float64()),
        ("dampening", pa.float64()),
        ("nesterov", pa.bool_()),
        ("maximize", pa.bool_()),
        ("weight_decay", pa.float64()),
        ("buffer_fresh", pa.bool_()),
        ("batch_size", pa.int64()),
        ("reduction", pa.string()),
        ("sample_factor", pa.float64()),
        ("optimizer", pa.string()),
        ("updates", pa.int64()),
        ("update", pa.int64()),
        ("gradient_factor", pa.float64()),
    ]
)
# In the metadata of a file of steps: the recorded parameters' names for each parameter group, as JSON.
PARAMETER_GROUPS = b"parameter_groups"
_LAYERS = pa.schema(
    [
        ("layer", pa.string()),
        ("kind", pa.string()),
        ("parameters", pa.list_(pa.string())),
        ("positions", pa.int64()),
        ("input_width", pa.int64()),
        ("output_width", pa.int64()),
        ("layout", pa.string()),
        ("factored_bytes", pa.int64()),
        ("full_bytes", pa.int64()),
        ("stored_bytes", pa.int64()),
        ("stored_rows", pa.int64()),
    ]
)
_CURVATURE = pa.schema(
    [
        ("checkpoint", pa.int64()),
        ("method", pa.string()),
        ("labels", pa.string()),
        ("samples", pa.int64()),
        ("layer", pa.string()),
        ("mean_eigenvalue", pa.float64()),
        ("damping", pa.float64()),
    ]
)

Array = np.ndarray[Any, np.dtype[Any]]


def gradients(store: Store) -> Any:
    """row, sample_id, split, checkpoint, step: a row for each recorded gradient."""
    schema = pa.schema([*_KEYS, *_MOMENT])
    return _concat([_rows(store, one, schema) for one in store.manifest.collections], schema)


def outputs(store: Store) -> Any:
    """row, sample_id, split, checkpoint, step, loss, prediction, confidence: as ``gradients``."""
    return rows(store).drop_columns(["collection"])


def rows(store: Store) -> Any:
    """``outputs``, and the number of the collection that each row is of."""
    schema = pa.schema([*_KEYS, *_MOMENT, *_OUTPUTS, ("collection", pa.int64())])
    return _concat([_rows(store, one, schema) for one in store.manifest.collections], schema)


def embeddings(store: Store) -> Any:
    """collection, layer: a row for each module whose outputs a collection keeps."""
    kept = [(one.number, each.layer) for one in store.manifest.collections for each in one.embeddings]
    numbers, layers = zip(*kept, strict=True) if kept else ((), ())
    return pa.table([column(numbers, pa.int64()), column(layers, pa.string())], names=["collection", "layer"])


def samples(store: Store) -> Any:
    """sample_id, split and the user's columns: a row for each sample, the newest value of a column that is given."""
    splits = dict.fromkeys(one.split for one in store.manifest.collections)
    tables = [_samples_of(store, split) for split in splits]
    none = empty(pa.schema([_KEYS.field("sample_id"), _KEYS.field("split")]))
    return pa.concat_tables([none, *tables], promote_options="permissive")


def checkpoints(store: Store) -> Any:
    """checkpoint, step, epoch, learning_rate and the other settings: a row for each checkpoint."""
    saved = store.manifest.checkpoints
    names = dict.fromkeys(["epoch", "learning_rate", *(name for one in saved for name in one.settings)])
    columns = {
        "checkpoint": column([one.number for one in saved], pa.int64()),
        "step": column([one.step for one in saved], pa.int64()),
    }
    columns |= {name: _setting([one.settings.get(name) for one in saved]) for name in names if name not in columns}
    return pa.table(columns)


def steps(store: Store) -> Any:
    """The optimizer's settings at each step of a recorded trajectory, and at each update without one (NULL)."""
    table = pa.concat_tables([empty(STEPS), *_step_files(store)], promote_options="permissive")
    table = table.replace_schema_metadata(None)
    # A step that was committed before its update is written again with it: the last one counts.
    step = table.column("step")
    there = as_numpy(pc.is_valid(step))
    known = np.flatnonzero(there)
    keys = np.stack([as_numpy(step.drop_null()), as_numpy(table.column("parameter_group"))[known]])
    _, last = np.unique(keys[:, ::-1], axis=1, return_index=True)
    chosen = np.sort(np.concatenate([known[::-1][last], np.flatnonzero(~there)]))
    return table.take(primitive(chosen, pa.int64())) if len(chosen) < len(there) else table


def parameter_groups(store: Store) -> list[list[str]] | None:
    """The recorded parameters of each parameter group; None without steps, or where groups changed between them.

    Groups may have been added.
    """
    noted = [(file.schema.metadata or {}).get(PARAMETER_GROUPS, b"null") for file in _step_files(store)]
    found = [json.loads(each) for each in dict.fromkeys(noted)]
    if not found or any(each is None or each != found[-1][: len(each)] for each in found):
        return None
    last: list[list[str]] = found[-1]
    return last


def _step_files(store: Store) -> list[Any]:
    return [store.table(one.steps) for one in store.manifest.collections if one.steps]


def layers(store: Store) -> Any:
    """What is recorded, a row a layer; ``factored_bytes`` and ``full_bytes`` are those of one sample."""
    rows = [_layer(store, layer) for layer in store.layers]
    lists = _LAYERS.field("parameters")
    columns = [
        _lists([row[field.name] for row in rows])
        if field == lists
        else column([row[field.name] for row in rows], field.type)
        for field in _LAYERS
    ]
    return pa.table(columns, schema=_LAYERS)


def curvature(store: Store) -> Any:
    """What was gathered, a row for each layer; ``damping`` is what is added to its eigenvalues by default."""
    rows = [
        (one.checkpoint, one.method, one.labels, one.samples, layer, mean, SHARE * mean)
        for one in store.manifest.curvatures
        for layer, mean in one.eigenvalues.items()
    ]
    columns = zip(*rows, strict=True) if rows else [()] * len(_CURVATURE)
    return pa.table(
        [column(each, field.type) for each, field in zip(columns, _CURVATURE, strict=True)], schema=_CURVATURE
    )


def _rows(store: Store, collection: Collection, schema: Any) -> Any:
    """A collection's rows with the columns of the schema, of which most are views of its file."""
    table = store.table(collection.row_file)
    first, count = collection.first_row, collection.rows
    # A split's name is stored once for a collection, not once for a row.
    names = column([collection.split], pa.string())
    split = pa.DictionaryArray.from_arrays(primitive(np.zeros(count, np.int8), pa.int8()), names)
    added = {
        "row": primitive(np.arange(first, first + count, dtype=np.int64), pa.int64()),
        "split": split,
        "checkpoint": repeated(collection.checkpoint, pa.int64(), count),
        "collection": repeated(collection.number, pa.int64(), count),
    }
    columns = [added[name] if name in added else table.column(name) for name in schema.names]
    return pa.table(columns, names=schema.names)


def _concat(tables: list[Any], schema: Any) -> Any:
    dictionary = pa.dictionary(pa.int8(), pa.string())
    place = schema.get_field_index("split")
    return pa.concat_tables([empty(schema.set(place, pa.field("split", dictionary))), *tables])


def _samples_of(store: Store, split: str) -> Any:
    collections = [one for one in store.manifest.collections if one.split == split]
    chunks = [as_numpy(store.table(one.row_file).column("sample_id")) for one in collections]
    ids = np.unique(np.concatenate(chunks))
    metadata = [store.table(one.metadata) for one in collections if one.metadata]
    names = dict.fromkeys(name for table in metadata for name in table.column_names if name != "sample_id")
    columns = {"sample_id": primitive(ids, pa.int64()), "split": repeated(split, pa.string(), len(ids))}
    columns |= {name: _newest(ids, [table for table in metadata if name in table.column_names], name) for name in names}
    return pa.table(columns)


def _newest(ids: Array, tables: list[Any], name: str) -> Any:
    """A column for these ids: of several tables, oldest first, the newest value that is not NULL."""
    chosen = np.full(len(ids), -1, dtype=np.int64)
    before = 0
    for table in tables:
        given = np.flatnonzero(as_numpy(pc.is_valid(table.column(name))))
        place, known = _places(ids, as_numpy(table.column("sample_id"))[given])
        chosen[place] = before + given[known]
        before += table.num_rows
    parts = [table.select([name]).unify_dictionaries() for table in tables]
    values = pa.concat_tables(parts, promote_options="permissive").column(name)
    return values.take(primitive(chosen, pa.int64(), chosen >= 0))


def _places(ids: Array, wanted: Array) -> tuple[Array, Array]:
    """Where the wanted ids stand in the sorted ids, for those that do, and which do."""
    place = np.searchsorted(ids, wanted)
    known = place < len(ids)
    known[known] = ids[place[known]] == wanted[known]
    return place[known], known


def _setting(values: list[Any]) -> Any:
    """A column of settings: of their common type, or as JSON text when they have none."""
    if all(value is None for value in values):
        return pa.nulls(len(values), pa.float64())
    if all(value is None or (isinstance(value, int | float) and not isinstance(value, bool)) for value in values):
        whole = all(value is None or isinstance(value, int) for value in values)
        return column(values, pa.int64() if whole else pa.float64())
    for kind, plain in ((bool, pa.bool_()), (str, pa.string())):
        if all(value is None or isinstance(value, kind) for value in values):
            return column(values, plain)
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return column([None if value is None else json.dumps(value) for value in values], pa.string())


def _lists(values: list[list[str]]) -> Any:
    offsets = np.cumsum([0, *map(len, values)]).astype(np.int32)
    flat = [value for each in values for value in each]
    return pa.ListArray.from_arrays(primitive(offsets, pa.int32()), column(flat, pa.string()))


def _layer(store: Store, layer: Layer) -> dict[str, Any]:
    segments = [
        [one for each in store.manifest.collections for one in each.segments if one.layer == part.name]
        for part in stored_parts(layer)
    ]
    return {
        "layer": layer.name,
        "kind": layer.kind,
        "parameters": [parameter.name for parameter in layer.parameters],
        "positions": layer.positions,
        "input_width": layer.input_width,
        "output_width": layer.output_width,
        "layout": layer.layout,
        "factored_bytes": _factored_bytes(layer, segments),
        "full_bytes": layer.width * FLOAT_BYTES[layer.dtype],
        "stored_bytes": sum(one.file.bytes for part in segments for one in part),
        "stored_rows": sum(one.rows for one in segments[0]),
    }


def _factored_bytes(layer: Layer, segments: list[list[Segment]]) -> int | None:
    """Bytes of an average sample's factors: of those that are stored, else of those in the first batch."""
    if layer.input_width is None:
        return None
    total = 0
    for number, part in enumerate(parts(layer)):
        stored = segments[number] if layer.layout != FULL else []
        rows = sum(one.rows for one in stored)
        positions = sum(one.statistics.positions for one in stored) / rows if rows else part.positions
        if positions is None:
            return None
        total += _bytes_of(part, positions)
    return total


def _bytes_of(layer: Layer, positions: float) -> int:
    return round(suffix_bytes(layer, 1, positions) + positions * prefix_width(layer) * FLOAT_BYTES[layer.dtype])
