"""Suffixes that layers have in common are stored once, wherever that is less, and come back for each of them."""

from __future__ import annotations

import json
import shutil
import zlib

import numpy as np
import pytest
import torch

from metaql.errors import CorruptStoreError
from metaql.storage import bundle, collection_writer, segments
from metaql.storage.blocks import Factored
from metaql.storage.check import check
from metaql.storage.maintenance import vacuum
from metaql.storage.schema import FACTORED, Layer, Parameter, Unfold
from metaql.storage.store import Store
from metaql.storage.writer import Writer

INPUT = 5
UNFOLD = Unfold((2, 4, 4), (3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1))
# Header, footer and what stands before a record batch.
AROUND = 1500


def linear(name, outputs, dtype="float32"):
    weight = Parameter(f"{name}.weight", (outputs, INPUT))
    return Layer(name, "linear", (weight,), FACTORED, dtype, 1, INPUT, outputs, 4)


def convolution(name, outputs):
    weight = Parameter(f"{name}.weight", (outputs, 2, 3, 3))
    return Layer(name, "conv", (weight,), FACTORED, "float32", 1, 18, outputs, 16, UNFOLD)


QKV = linear("query", 6), linear("key", 4), linear("value", 3)


def attention(samples, positions, layers=QKV, apart=(), zeros=()):
    """Blocks with one suffix, save for the layers ``apart``; layer => positions (bool) where its prefix is zero."""
    suffix = torch.randn(samples * positions, INPUT)
    blocks = {}
    for layer in layers:
        prefix = torch.randn(samples * positions, layer.output_width)
        own = suffix.clone() if layer.name in apart else suffix
        blocks[layer.name] = Factored(own, prefix, samples)
    for name, places in dict(zeros).items():
        blocks[name].prefix[places] = 0
    return blocks


def record(path, batches, layers=QKV, splits=("train",)):
    with Writer.open(path) as writer:
        writer.define("Net", layers, layers[0].dtype)
        for split in splits:
            collection = writer.collection(split, None)
            for blocks in batches:
                samples = blocks[layers[0].name].samples
                collection.append(np.arange(samples) + collection.rows, blocks, None, step=1)
            collection.finish()
    return Store.open(path)


def gradients(block):
    """Each sample's Σ_s prefix_s suffix_sᵀ, in float64."""
    offsets = block.offsets
    if offsets is None:
        offsets = torch.arange(block.samples + 1) * (len(block.prefix) // block.samples)
    pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    return torch.stack([block.prefix[a:b].double().T @ block.suffix[a:b].double() for a, b in pairs])


def assert_read(store, batches):
    """Whatever rows are asked for, in the store's first collection."""
    rows = len(np.concatenate([np.arange(next(iter(one.values())).samples) for one in batches]))
    random = np.random.default_rng(0)
    for layer in store.layers:
        expected = torch.cat([gradients(one[layer.name]) for one in batches])
        for wanted in (np.arange(rows), np.arange(rows)[::-1].copy(), random.integers(0, rows, 40), np.arange(1, 3)):
            found = gradients(store.read(layer, wanted))
            torch.testing.assert_close(found, expected[wanted], rtol=1e-12, atol=1e-12)


def holders(store):
    """layer => the names that its segments give for their suffixes, in order."""
    found = {layer.name: [] for layer in store.layers}
    for collection in store.manifest.collections:
        for one in collection.segments:
            found[one.layer].append(one.suffix_of)
    return found


@pytest.fixture(params=["one batch", "many batches", "cut batches"])
def _batches(request, monkeypatch):
    if request.param != "one batch":
        monkeypatch.setattr(collection_writer, "_FLUSH_BYTES", 500)
    if request.param == "cut batches":
        monkeypatch.setattr(bundle, "_LARGEST_BATCH_BYTES", 400)
        monkeypatch.setattr(bundle, "_SLICE_BYTES", 300)
        monkeypatch.setattr(segments, "_SHARE_OF_DESCRIPTORS", 1 << 62)


@pytest.mark.usefixtures("_batches")
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_query_key_and_value(tmp_path, dtype):
    layers = tuple(linear(one.name, one.output_width, dtype) for one in QKV)
    batches = [attention(samples, 4, layers) for samples in (7, 1, 30)]
    for one in batches:
        for block in one.values():
            block.prefix.copy_(block.prefix.bfloat16())
        block.suffix.copy_(block.suffix.bfloat16())
    store = record(tmp_path, batches, layers)
    assert holders(store) == {"query": [None], "key": ["query"], "value": ["query"]}
    assert_read(store, batches)
    assert list(check(tmp_path)) == []


def test_bytes(tmp_path):
    store = record(tmp_path, [attention(500, 4)])
    numbers = {"query": INPUT + 6, "key": 4, "value": 3}
    for one in store.manifest.collections[0].segments:
        assert 0 < one.file.bytes - 4 * 500 * 4 * numbers[one.layer] < AROUND
    # What is read of a row is what it would be with suffixes of its own.
    assert store.row_bytes(QKV[1]) == pytest.approx(4 * 4 * (INPUT + 4), abs=4)


@pytest.mark.usefixtures("_batches")
def test_padding_is_dropped_for_all_of_them(tmp_path):
    padding = torch.rand(30 * 4) < 0.4
    blocks = attention(30, 4, zeros={one.name: padding for one in QKV})
    store = record(tmp_path, [blocks, blocks])
    assert holders(store) == {"query": [None], "key": ["query"], "value": ["query"]}
    assert {one.form for one in store.manifest.collections[0].segments} == {"differing"}
    kept = {one.statistics.positions for one in store.manifest.collections[0].segments}
    assert kept == {2 * int((~padding).sum())}
    assert_read(store, [blocks, blocks])


def test_one_that_needs_far_fewer_positions_has_a_copy(tmp_path):
    """As in a last layer of BERT, where only the first word's query is used."""
    others = torch.arange(30 * 4) % 4 != 0
    blocks = attention(30, 4, zeros={"query": others})
    store = record(tmp_path, [blocks])
    assert holders(store) == {"query": [None], "key": [None], "value": ["key"]}
    assert_read(store, [blocks])
    positions = {one.layer: one.statistics.positions for one in store.manifest.collections[0].segments}
    assert positions == {"query": 30, "key": 120, "value": 120}


def test_one_that_needs_a_few_less_has_zeros(tmp_path):
    """As in a decoder, whose first word's query meets one key alone and has a gradient of zero."""
    padding, first = torch.rand(30 * 8) < 0.3, torch.arange(30 * 8) % 8 == 0
    zeros = {"query": padding | first, "key": padding, "value": padding}
    blocks = attention(30, 8, zeros=zeros)
    store = record(tmp_path, [blocks])
    assert holders(store) == {"query": [None], "key": ["query"], "value": ["query"]}
    assert_read(store, [blocks])


@pytest.mark.usefixtures("_batches")
def test_those_that_part_go_on_apart(tmp_path):
    """Whatever they have in common later: segments would come and go."""
    batches = [attention(9, 4), attention(12, 4, apart=["value"]), attention(8, 4), attention(5, 3, apart=["key"])]
    batches.append(attention(6, 3))
    store = record(tmp_path, batches)
    found = {name: list(dict.fromkeys(names)) for name, names in holders(store).items()}
    assert found == {"query": [None], "key": ["query", None], "value": ["query", None]}
    assert_read(store, batches)


def test_the_first_two_that_share_need_not_be_the_first(tmp_path):
    batches = [attention(9, 4, apart=["query"])]
    store = record(tmp_path, batches)
    assert holders(store) == {"query": [None], "key": [None], "value": ["key"]}
    assert_read(store, batches)


def test_inputs_of_convolutions(tmp_path):
    """As of a block of a ResNet, whose shortcut is a convolution too."""
    layers = convolution("first", 3), convolution("shortcut", 2)
    images = torch.randn(20, 32)
    blocks = {one.name: Factored(images, torch.randn(20 * 16, one.output_width), 20) for one in layers}
    store = record(tmp_path, [blocks], layers)
    assert holders(store) == {"first": [None], "shortcut": ["first"]}
    for layer in layers:
        found = store.read(layer, np.array([3, 17, 3]))
        assert torch.equal(found.suffix, images[[3, 17, 3]])
        assert torch.equal(found.prefix, blocks[layer.name].prefix.view(20, 16, -1)[[3, 17, 3]].flatten(0, 1))


def test_several_collections_and_a_vacuum(tmp_path):
    batches = [attention(9, 4)]
    record(tmp_path, batches, splits=("train", "validation"))
    store = record(tmp_path, [attention(9, 4, apart=["key"])])
    assert holders(store) == {"query": [None] * 3, "key": ["query", "query", None], "value": ["query"] * 3}
    vacuum(tmp_path)
    assert_read(Store.open(tmp_path), batches)
    assert list(check(tmp_path)) == []


def test_damage_to_the_layer_that_has_the_suffixes_is_seen(tmp_path):
    record(tmp_path, [attention(30, 4)])
    path = tmp_path / "collections/00000001/0-0.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptStoreError, match=r"0-0.arrow is changed"):
        Store.open(tmp_path).read(QKV[2], np.arange(4))
    path.write_bytes(data[:-100])
    with pytest.raises(CorruptStoreError, match=r"0-0.arrow has"):
        Store.open(tmp_path).read(QKV[2], np.arange(4))


def test_a_store_of_the_second_version_goes_on(tmp_path):
    """Its segments all have their suffixes, and don't say so."""
    batches = [attention(9, 4, apart=["key", "value"])]
    record(tmp_path / "old", batches)
    pointer, version = tmp_path / "old/HEAD", Store.open(tmp_path / "old").version
    path = tmp_path / f"old/manifests/{version:08d}.json"
    body = json.loads(path.read_bytes().splitlines()[1])
    for segment in body["collections"][0]["segments"]:
        del segment["suffix_of"]
    line = json.dumps(body).encode()
    header = {"format": "metaql", "format_version": 2, "bytes": len(line), "crc32": zlib.crc32(line)}
    data = json.dumps(header).encode() + b"\n" + line + b"\n"
    path.write_bytes(data)
    pointer.write_text(f"{version} {zlib.crc32(data):08x}\n")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    assert_read(Store.open(tmp_path / "old"), batches)
    more = attention(5, 4)
    store = record(tmp_path / "new", [more])
    assert holders(store) == {"query": [None, None], "key": [None, "query"], "value": [None, "query"]}
    assert_read(store, [*batches, more])
