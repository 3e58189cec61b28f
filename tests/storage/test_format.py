"""docs/storage-format.md is precise enough: the reader that stands in it reads what we wrote."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from metaql.storage import manifest as records
from metaql.storage.blocks import lay_out
from metaql.storage.manifest_json import FORMAT_VERSION
from metaql.storage.schema import Layer, Unfold
from metaql.storage.store import Store

PAGE = (Path(__file__).parents[2] / "docs" / "storage-format.md").read_text()


@pytest.fixture
def second_reader():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {"__name__": "second_reader"}
    exec(code, names)
    return names


@pytest.mark.parametrize("name", ["vector", "sequence", "ragged", "grouped", "scale"])
def test_the_second_reader_agrees(store_path, second_reader, name):
    store = Store.open(store_path)
    layer = store.layer(name)
    for row in (0, 39, 40, 121):
        found = torch.tensor(second_reader["gradient"](store_path, name, row)).flatten()
        expected = lay_out(layer, store.read(layer, torch.tensor([row]).numpy()))[0]
        torch.testing.assert_close(found, expected[: len(found)], rtol=1e-5, atol=1e-6)
        assert len(found) == layer.parameters[0].width


def test_the_second_reader_sees_damage(store_path, second_reader):
    path = store_path / "collections/00000001/0-0.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match=r"changed"):
        second_reader["gradient"](store_path, "vector", 0)


def test_the_page_names_every_key(store_path):
    version = json.loads((store_path / "HEAD").read_text().split()[0])
    body = json.loads((store_path / f"manifests/{version:08d}.json").read_text().splitlines()[1])
    assert body.keys() == {field.name for field in dataclasses.fields(records.Manifest)}
    kinds = (
        records.Manifest,
        records.Checkpoint,
        records.Collection,
        records.Inputs,
        records.Embeddings,
        records.Segment,
        records.Statistics,
        Layer,
        Unfold,
    )
    for kind in kinds:
        for field in dataclasses.fields(kind):
            assert f"`{field.name}`" in PAGE, f"{kind.__name__}.{field.name}"
    assert f"Version {FORMAT_VERSION}." in PAGE
