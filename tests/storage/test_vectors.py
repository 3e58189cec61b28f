"""Logits and embeddings in the store: written beside the gradients, read where they lie, and looked after as they."""

from __future__ import annotations

import json
import zlib
from operator import itemgetter

import duckdb
import numpy as np
import pytest
import torch

import metaql
from metaql.errors import CorruptStoreError, InternalError, ReferenceError, WriteError
from metaql.storage.blocks import Full
from metaql.storage.check import check
from metaql.storage.info import info
from metaql.storage.maintenance import drop_checkpoint, vacuum
from metaql.storage.schema import FULL, Layer, Parameter
from metaql.storage.store import Store
from metaql.storage.writer import Writer
from tests.storage.full_disk import room_for

# The train split goes on at a second checkpoint alone.
pytestmark = pytest.mark.filterwarnings("ignore:the splits were last collected at different checkpoints")
LAYER = Layer("scale", "norm", (Parameter("scale.weight", (2,)),), FULL, "float32")


def append(collection, first, count, logits=None, **embeddings):
    blocks = {"scale": Full(torch.zeros(count, 2))}
    collection.append(np.arange(first, first + count), blocks, np.zeros(count), logits=logits, embeddings=embeddings)


def outputs(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def writer(tmp_path):
    with Writer.open(tmp_path / "store") as writer:
        writer.define("Net", (LAYER,), "float32")
        yield writer


@pytest.fixture
def path(tmp_path, writer, monkeypatch):
    """Two checkpoints: rows 0-9 with two layers and logits, 10-19 with one and none, 20-29 of other sizes."""
    for number, flush in ((1, 1 << 24), (2, 1)):
        # Each batch of samples is a record batch of its own at the second.
        monkeypatch.setattr("metaql.storage.collection_writer._FLUSH_BYTES", flush)
        writer.add_checkpoint({}, "", number, {})
        collection = writer.collection("train", number)
        for first in (0, 4):
            count, sizes = 4 + first // 2, (2, 3) if number == 1 else (first + 1,)
            layers = {"conv": outputs(count, *sizes, seed=first)} if number == 2 else {}
            layers |= (
                {"conv": outputs(count, 2, 3, seed=first), "": outputs(count, 5, seed=first + 1)} if number == 1 else {}
            )
            append(collection, first, count, outputs(count, 3, seed=first + 2) if number == 1 else None, **layers)
        collection.finish()
        if number == 1:
            validation = writer.collection("validation", 1)
            append(validation, 0, 10, conv=outputs(10, 2, 3, seed=9))
            validation.finish()
    return tmp_path / "store"


def expected(layer):
    """row => its values, by hand."""
    if layer == "":
        parts = [(0, outputs(4, 5, seed=1)), (4, outputs(6, 5, seed=5))]
    elif layer == "logits":
        parts = [(0, outputs(4, 3, seed=2)), (4, outputs(6, 3, seed=6))]
    else:
        parts = [
            (0, outputs(4, 2, 3, seed=0)),
            (4, outputs(6, 2, 3, seed=4)),
            (10, outputs(10, 2, 3, seed=9)),
            (20, outputs(4, 1, seed=0)),
            (24, outputs(6, 5, seed=4)),
        ]
    return {first + place: one for first, part in parts for place, one in enumerate(part)}


@pytest.mark.parametrize("layer", ["conv", "", "logits"])
@pytest.mark.parametrize(
    "rows", [range(30), [3], range(2, 8), [29, 0, 11, 3, 3, 24, 20, 9], range(29, -1, -1), [], range(20, 30)]
)
def test_rows_in_any_order(path, layer, rows):
    store, known = Store.open(path), expected(layer)
    rows = np.array(rows, dtype=np.int64)
    values = (store.logits(rows) if layer == "logits" else store.embeddings(layer, rows)).to_pylist()
    want = [known[row].flatten().tolist() if row in known else None for row in rows.tolist()]
    assert values == want
    if layer != "logits":
        shapes = store.embeddings(layer, rows, "shape").to_pylist()
        assert shapes == [list(known[row].shape) if row in known else None for row in rows.tolist()]


def test_a_layer_that_nobody_kept_is_null(path):
    assert Store.open(path).embeddings("fc", np.arange(3)).null_count == 3


def test_rows_that_are_not_there(path):
    with pytest.raises(ReferenceError, match="Row 30 is not"):
        Store.open(path).embeddings("conv", np.array([3, 30]))


def test_consecutive_rows_are_views_of_the_file(path):
    store = Store.open(path)
    (file,) = [one.file for one in store.manifest.collections[1].embeddings]
    whole = store.table(file).column("values").chunk(0).values
    part = store.embeddings("conv", np.arange(12, 17))
    assert part.values.buffers()[1].address == whole.buffers()[1].address


def test_the_relation(path):
    with metaql.connect(path) as db:
        found = db.sql("SELECT split, checkpoint, sample_id, layer, shape, embedding FROM embeddings").fetchall()
        logits = db.sql("SELECT checkpoint, split, sample_id, logits FROM outputs WHERE logits IS NOT NULL").fetchall()
        types = db.sql("SELECT shape, embedding FROM embeddings").types
    conv, root = expected("conv"), expected("")
    want = [
        ("train" if not 10 <= row < 20 else "validation", 1 + row // 20, row % 10, "conv", one)
        for row, one in conv.items()
    ]
    want += [("train", 1, row, "", one) for row, one in root.items()]
    key = itemgetter(slice(4))
    assert sorted(found, key=key) == [
        (*one[:4], list(one[4].shape), one[4].flatten().tolist()) for one in sorted(want, key=key)
    ]
    assert sorted(logits) == [(1, "train", row, one.tolist()) for row, one in expected("logits").items()]
    assert list(map(str, types)) == ["INTEGER[]", "FLOAT[]"]


def test_a_store_without_any_has_an_empty_relation(store_path):
    with metaql.connect(store_path) as db:
        assert db.sql("SELECT count(*) FROM embeddings").fetchall() == [(0,)]
        assert "logits" not in db.sql("FROM outputs").columns


def test_splits_do_not_drag_them_along(path):
    with metaql.connect(path) as db:
        assert not {"logits", "embedding"} & set(db.sql("FROM train").columns)


def test_they_are_read_by_cursors_joins_and_other_connections(path):
    query = """
        SELECT v.sample_id, arg_max(t.sample_id, list_cosine_similarity(t.embedding, v.embedding))
        FROM {0}embeddings t JOIN {0}embeddings v USING (layer) WHERE t.split = 'train' AND v.split = 'validation'
        AND t.checkpoint = 1 GROUP BY ALL ORDER BY ALL
    """
    conv = expected("conv")
    train, validation = (torch.stack([conv[first + place].flatten() for place in range(10)]) for first in (0, 10))
    nearest = torch.cosine_similarity(train[None], validation[:, None], dim=2).argmax(1)
    with metaql.connect(path) as db:
        one, other = db.sql(query.format("")), db.sql(query.format(""))
        assert one.fetchall() == other.fetchall() == list(enumerate(nearest.tolist()))
    connection = duckdb.connect()
    metaql.load(connection, path, schema="a")
    assert connection.sql(query.format("a.")).fetchall() == list(enumerate(nearest.tolist()))
    connection.close()


def test_beside_gradients(path):
    with metaql.connect(path) as db:
        rows = db.sql("""
            SELECT t.sample_id, len(e.embedding), avg(inner_product(t.gradient, v.gradient)) AS influence
            FROM train t JOIN embeddings e USING (sample_id), validation v
            WHERE e.split = 'train' AND e.checkpoint = 2 GROUP BY ALL ORDER BY ALL
        """).fetchall()
    assert rows == [(row - 20, one.numel(), 0.0) for row, one in expected("conv").items() if row >= 20]


def damage(path, name):
    file = path / "collections/00000001" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("name", ["embeddings-0.arrow", "embeddings-1.arrow", "logits.arrow"])
def test_damage_is_found_where_it_is_read(path, name):
    damage(path, name)
    (problem,) = check(path)
    assert name in problem
    assert "is changed" in problem
    column, relation = ("logits", "outputs") if name == "logits.arrow" else ("embedding", "embeddings")
    with metaql.connect(path) as db:
        # Connecting, and whatever looks at other columns or rows, reads none of it.
        assert len(db.sql(f"SELECT {column} FROM {relation} WHERE checkpoint = 2").fetchall()) == 10
        assert db.sql(f"SELECT count(*) FROM {relation} WHERE checkpoint = 1").fetchall()[0][0] > 9
        with pytest.raises(duckdb.InvalidInputException, match="is changed"):
            db.sql(f"SELECT {column} FROM {relation}").fetchall()
    store, layer = Store.open(path), "conv" if name == "embeddings-0.arrow" else ""
    with pytest.raises(CorruptStoreError, match="is changed"):
        store.logits(np.arange(3)) if name == "logits.arrow" else store.embeddings(layer, np.arange(3))


def test_they_go_with_their_checkpoint(path, writer):
    writer.close()
    drop_checkpoint(path, 1)
    assert vacuum(path) > 0
    assert [each.name for each in path.glob("collections/*/*.arrow") if each.name[0] in "el"] == ["embeddings-0.arrow"]
    assert list(check(path)) == []
    with metaql.connect(path) as db:
        assert db.sql("SELECT DISTINCT checkpoint, layer FROM embeddings").fetchall() == [(2, "conv")]


def test_info_tells_of_them(path):
    lines = str(info(path)).splitlines()
    assert [line.split("MB")[1] for line in lines[-3:]] == [
        ", with logits and embeddings of conv, ''",
        ", with embeddings of conv",
        ", with embeddings of conv",
    ]


def test_a_manifest_from_before_there_were_any(store_path):
    """Without the two keys, as it was written then."""
    version = int((store_path / "HEAD").read_text().split()[0])
    manifest = store_path / f"manifests/{version:08d}.json"
    body = json.loads(manifest.read_text().splitlines()[1])
    for one in body["collections"]:
        del one["logits"], one["embeddings"]
    text = json.dumps(body).encode()
    header = {"format": "metaql", "format_version": 1, "bytes": len(text), "crc32": zlib.crc32(text)}
    data = json.dumps(header).encode() + b"\n" + text + b"\n"
    manifest.write_bytes(data)
    (store_path / "HEAD").write_text(f"{version} {zlib.crc32(data):08x}\n")
    assert {(one.logits, one.embeddings) for one in Store.open(store_path).manifest.collections} == {(None, ())}


def test_the_disk_fills_up(tmp_path, writer):
    writer.add_checkpoint({}, "", 1, {})
    collection = writer.collection("train", 1)
    append(collection, 0, 100, conv=outputs(100, 1000))
    with room_for(100_000), pytest.raises(WriteError, match="intact"):
        collection.finish()
    assert Store.open(tmp_path / "store").manifest.collections == ()
    assert list(check(tmp_path / "store")) == []
    assert not list((tmp_path / "store" / "recording").iterdir())


@pytest.mark.parametrize("rest", [{}, {"conv": outputs(3, 2)}, {"conv": outputs(2, 2), "fc": outputs(2, 2)}])
def test_samples_with_other_layers_than_those_before(writer, rest):
    collection = writer.collection("train", None)
    append(collection, 0, 4, conv=outputs(4, 2))
    with pytest.raises(InternalError, match="other logits or embeddings"):
        append(collection, 4, 2, **rest)
    append(collection, 4, 2, conv=outputs(2, 7))
    assert collection.finish() == 6
