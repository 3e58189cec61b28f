"""The relations of a store as Arrow tables."""

from __future__ import annotations

import sys
from contextlib import closing, contextmanager

import numpy as np
import pyarrow as pa
import pytest
import torch

from metaql.storage import tables
from metaql.storage.blocks import Full
from metaql.storage.schema import FULL, Layer, Parameter
from metaql.storage.store import Store
from metaql.storage.writer import Writer

LAYER = Layer("scale", "norm", (Parameter("scale.weight", (2,)),), FULL, "float32")


def collect(writer, split, checkpoint, ids, metadata=None, **rest):
    collection = writer.collection(split, checkpoint)
    collection.append(np.array(ids), {"scale": Full(torch.zeros(len(ids), 2))}, np.arange(len(ids)) / 2, **rest)
    collection.finish(None if metadata is None else pa.table(metadata))


@pytest.fixture
def writer(tmp_path):
    with Writer.open(tmp_path) as writer:
        writer.define("Net", (LAYER,), "float32")
        yield writer


def test_an_empty_store_has_empty_tables(tmp_path, writer):
    store = Store.open(tmp_path)
    for relation in (tables.samples, tables.checkpoints, tables.steps, tables.layers, tables.outputs, tables.gradients):
        assert relation(store).num_rows == 0
    assert tables.samples(store).column_names == ["sample_id", "split"]


def test_gradients_and_outputs(tmp_path, writer):
    number = writer.add_checkpoint({}, "", 10, {})
    collect(writer, "train", number, [5, 3], prediction=np.array([1, 2]), confidence=np.array([0.5, 0.25]))
    collect(writer, "validation", None, [7], step=99)
    store = Store.open(tmp_path)
    assert tables.gradients(store).to_pylist() == [
        {"row": 0, "sample_id": 5, "split": "train", "checkpoint": 1, "step": None},
        {"row": 1, "sample_id": 3, "split": "train", "checkpoint": 1, "step": None},
        {"row": 2, "sample_id": 7, "split": "validation", "checkpoint": None, "step": 99},
    ]
    outputs = tables.outputs(store)
    assert outputs.column("loss").to_pylist() == [0.0, 0.5, 0.0]
    assert outputs.column("prediction").to_pylist() == [1, 2, None]
    assert outputs.column("confidence").to_pylist() == [0.5, 0.25, None]


def test_the_newest_value_of_a_column_wins_unless_it_is_missing(tmp_path, writer):
    collect(writer, "train", None, [1, 2, 3], {"sample_id": [3, 1], "label": [30, 10], "note": ["c", "a"]})
    collect(writer, "train", None, [2, 4], {"sample_id": [2, 1, 9], "label": [21, None, 90]})
    collect(writer, "validation", None, [1], {"sample_id": [1], "label": [100]})
    assert tables.samples(Store.open(tmp_path)).to_pylist() == [
        {"sample_id": 1, "split": "train", "label": 10, "note": "a"},
        {"sample_id": 2, "split": "train", "label": 21, "note": None},
        {"sample_id": 3, "split": "train", "label": 30, "note": "c"},
        {"sample_id": 4, "split": "train", "label": None, "note": None},
        {"sample_id": 1, "split": "validation", "label": 100, "note": None},
    ]


def test_metadata_of_samples_that_were_not_recorded(tmp_path, writer):
    writer.collection("train", None).finish(pa.table({"sample_id": [1], "label": [3]}))
    samples = tables.samples(Store.open(tmp_path))
    assert samples.num_rows == 0
    assert samples.column_names == ["sample_id", "split", "label"]


def test_categories_come_back_as_their_values(tmp_path, writer):
    colours = pa.chunked_array([pa.array(["red", "red"]).dictionary_encode(), pa.array(["blue"]).dictionary_encode()])
    collect(writer, "train", None, [1, 2, 3], {"sample_id": [1, 2, 3], "colour": colours})
    collect(writer, "train", None, [3], {"sample_id": [3], "colour": pa.array(["green"]).dictionary_encode()})
    colours = tables.samples(Store.open(tmp_path)).column("colour")
    assert colours.to_pylist() == ["red", "red", "green"]


def test_checkpoints_have_a_column_for_each_setting(tmp_path, writer):
    writer.add_checkpoint({}, "", 10, {"learning_rate": 0.1, "nesterov": True, "betas": (0.9, 0.99)})
    writer.add_checkpoint({}, "", None, {"learning_rate": 1, "epoch": 2, "name": "warm"})
    writer.add_checkpoint({}, "", 30, {"name": 3})
    assert tables.checkpoints(Store.open(tmp_path)).to_pydict() == {
        "checkpoint": [1, 2, 3],
        "step": [10, None, 30],
        "epoch": [None, 2, None],
        "learning_rate": [0.1, 1.0, None],
        "nesterov": [True, None, None],
        "betas": [[0.9, 0.99], None, None],
        "name": [None, '"warm"', "3"],
    }


def test_steps_of_several_collections_follow_one_another(tmp_path, writer):
    for step in (1, 2):
        collection = writer.collection("train", None)
        collection.append(np.array([1]), {"scale": Full(torch.zeros(1, 2))}, [0.5], step=step)
        collection.finish(steps=pa.table({"step": [step], "parameter_group": [0], "learning_rate": [0.1]}))
    steps = tables.steps(Store.open(tmp_path))
    assert steps.column("step").to_pylist() == [1, 2]
    assert steps.column("momentum").to_pylist() == [None, None]


def test_layers(store_path):
    store = Store.open(store_path)
    relation = tables.layers(store)
    rows = {row["layer"]: row for row in relation.to_pylist()}
    assert rows["vector"]["parameters"] == ["vector.weight", "vector.bias"]
    assert rows["vector"]["factored_bytes"] == 4 * (7 + 3)
    assert rows["vector"]["full_bytes"] == 4 * (3 * 7 + 3)
    assert rows["vector"]["stored_rows"] == 160
    assert rows["image"]["factored_bytes"] == 4 * (4 * 5 * 6 + 30 * 6)
    # A fifth of the positions is zero and was left out.
    segments = [one for each in store.manifest.collections for one in each.segments if one.layer == "grouped"]
    kept = sum(segment.statistics.positions for segment in segments)
    assert kept < 0.9 * 160 * 5
    assert rows["grouped"]["factored_bytes"] == round(4 * kept / 160 * (2 * 4 + 6))
    assert rows["scale"]["factored_bytes"] is None
    segments = [one for each in store.manifest.collections for one in each.segments if one.layer.startswith("shared")]
    projection, looked_up = (
        sum(one.statistics.positions for one in segments if one.layer == name) for name in ("shared", "shared (table)")
    )
    assert rows["shared"]["factored_bytes"] == round(4 * projection / 160 * (3 + 8)) + round(4 * looked_up / 160 * 4)
    assert rows["shared"]["full_bytes"] == 4 * 3 * 8
    assert rows["shared"]["stored_rows"] == 160
    assert rows["shared"]["stored_bytes"] == sum(one.file.bytes for one in segments)
    assert rows["table"]["factored_bytes"] > 0
    assert all(row["stored_bytes"] > 0 for row in rows.values())


@contextmanager
def counting_calls():
    """Within it, the list that it gives has a number that counts the calls made by Python code, also those of C."""
    calls = [0]

    def count(_frame, event, _argument):
        calls[0] += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def test_python_does_not_go_through_the_rows(tmp_path):
    """A thousand times the rows are a few more calls, for there are more record batches of them."""

    def calls_of(relation, rows):
        path = tmp_path / str(rows)
        if not path.exists():
            fill(path, rows)
        with closing(Store.open(path)) as store, counting_calls() as calls:
            assert relation(store).num_rows == rows
        return calls[0]

    for relation in (tables.gradients, tables.samples):
        # The first call may load or compile something.
        calls_of(relation, 400)
        assert calls_of(relation, 400_000) < 2 * calls_of(relation, 400)


def fill(path, rows):
    """A store of four collections that have so many rows together."""
    with Writer.open(path) as writer:
        writer.define("Net", (LAYER,), "float32")
        for step, ids in enumerate(np.split(np.arange(rows), 4)):
            collect(writer, "train", None, ids, {"sample_id": ids, "label": ids % 10}, step=step)
