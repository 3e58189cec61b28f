"""What is recorded comes back exactly, in every form, whatever rows are asked for and in whatever order."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from metaql.errors import ReferenceError, UnknownNameError
from metaql.storage import bundle, collection_writer, segments
from metaql.storage.blocks import Factored, Full, Tied, lay_out
from metaql.storage.store import Store
from metaql.storage.writer import Writer


@pytest.fixture(params=["one batch", "many batches", "cut batches"])
def batches(request, monkeypatch):
    """Makes a few kilobytes into as many record batches as gigabytes would be."""
    if request.param != "one batch":
        monkeypatch.setattr(collection_writer, "_FLUSH_BYTES", 2000)
        monkeypatch.setattr(collection_writer, "_FLUSH_ROWS", 20)
    if request.param == "cut batches":
        monkeypatch.setattr(bundle, "_LARGEST_BATCH_BYTES", 900)
        monkeypatch.setattr(bundle, "_SLICE_BYTES", 500)
        monkeypatch.setattr(segments, "_SHARE_OF_DESCRIPTORS", 1 << 62)
    return request.param


def widened(block):
    """A block as ``read`` gives it: bfloat16 as float32."""

    def wide(tensor):
        return tensor.float() if tensor.dtype == torch.bfloat16 else tensor

    if isinstance(block, Full):
        return Full(wide(block.gradient))
    return block.each(lambda one: Factored(wide(one.suffix), wide(one.prefix), one.samples, one.offsets))


def sample(layer, block, number):
    """What one sample holds, without its zero positions, as a list of tensors: the plain second way to read."""
    if isinstance(block, Full):
        return [block.gradient[number]]
    if isinstance(block, Tied):
        return [*sample(layer, block.projection, number), *sample(layer, block.table, number)]
    count = len(block.prefix) // block.samples
    begin, end = number * count, (number + 1) * count
    if block.offsets is not None:
        begin, end = int(block.offsets[number]), int(block.offsets[number + 1])
    prefix = block.prefix[begin:end]
    if layer.unfold is not None:
        return [block.suffix[number], prefix]
    kept = (prefix != 0).any(1)
    return [block.suffix[begin:end][kept], prefix[kept]]


def assert_same(layer, block, expected):
    assert block.samples == len(expected)
    for number, tensors in enumerate(expected):
        found = sample(layer, block, number)
        assert all(torch.equal(one, other) for one, other in zip(found, tensors, strict=True))


def record(path, layers, make_block, zeros):
    """Three collections of several batches each; gives each row's tensors by layer."""
    generator = torch.Generator().manual_seed(5)
    expected = {layer.name: [] for layer in layers}
    with Writer.open(path) as writer:
        writer.define("Net", layers, layers[0].dtype)
        number = writer.add_checkpoint({}, "", None, {})
        for split in ("train", "validation", "test"):
            collection = writer.collection(split, number)
            for count in (1, 13, 6, 22):
                blocks = {layer.name: make_block(layer, count, generator, zeros) for layer in layers}
                collection.append(np.arange(collection.rows, collection.rows + count), blocks, np.zeros(count))
                for layer in layers:
                    block = widened(blocks[layer.name])
                    expected[layer.name] += [sample(layer, block, k) for k in range(count)]
            assert collection.finish() == 42
    return expected


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("zeros", [0.0, 0.05, 0.6, 1.0])
def test_rows_come_back_exactly(tmp_path, make_layers, make_block, batches, dtype, zeros):
    layers = make_layers(dtype)
    expected = record(tmp_path, layers, make_block, zeros)
    store = Store.open(tmp_path)
    random = np.random.default_rng(3)
    wanted = [
        np.arange(126),
        np.arange(3, 9),
        np.array([125]),
        np.arange(30, 60),
        np.arange(125, -1, -1),
        np.array([7, 7, 7, 100, 0, 7]),
        *(random.integers(0, 126, size) for size in (1, 2, 5, 50, 300)),
        *(np.sort(random.integers(0, 126, size)) for size in (2, 50)),
        np.array([], dtype=np.int64),
    ]
    for layer in layers:
        for rows in wanted:
            assert_same(layer, store.read(layer, rows), [expected[layer.name][row] for row in rows])


def test_laid_out_gradients_are_the_same(tmp_path, make_layers, make_block):
    layers = make_layers("float64")
    generator = torch.Generator().manual_seed(1)
    blocks = {layer.name: make_block(layer, 30, generator, 0.4) for layer in layers}
    with Writer.open(tmp_path) as writer:
        writer.define("Net", layers, "float64")
        collection = writer.collection("train", writer.add_checkpoint({}, "", None, {}))
        collection.append(np.arange(30), blocks, np.zeros(30))
        collection.finish()
    store = Store.open(tmp_path)
    rows = np.random.default_rng(0).integers(0, 30, 50)
    for layer in layers:
        found = lay_out(layer, store.read(layer, rows))
        torch.testing.assert_close(found, lay_out(layer, blocks[layer.name])[rows], rtol=1e-12, atol=1e-12)


def test_consecutive_rows_are_views_of_the_file(store_path):
    store = Store.open(store_path)
    layer = store.layer("vector")
    first, again = store.read(layer, np.arange(5, 20)), store.read(layer, np.arange(5, 10))
    assert first.suffix.data_ptr() == again.suffix.data_ptr()
    store.close()
    assert torch.equal(first.suffix[:5], again.suffix)


def test_zero_positions_are_dropped_and_counted(tmp_path, make_layers, make_block):
    layer = make_layers("float32")[1]
    block = make_block(layer, 100, torch.Generator().manual_seed(2), 0.5)
    with Writer.open(tmp_path) as writer:
        writer.define("Net", (layer,), "float32")
        collection = writer.collection("train", None)
        collection.append(np.arange(100), {layer.name: block}, np.zeros(100), step=4)
        collection.finish()
    (segment,) = Store.open(tmp_path).manifest.collections[0].segments
    kept = int((block.prefix != 0).any(1).sum())
    assert segment.form == "differing"
    assert segment.statistics.positions == kept
    assert segment.statistics.dropped == 600 - kept
    assert segment.file.bytes < 0.75 * (block.prefix.nbytes + block.suffix.nbytes)


def test_rows_that_are_not_there(store_path):
    store = Store.open(store_path)
    layer = store.layer("vector")
    assert store.has_rows(np.arange(160))
    for row in (-1, 160, 10**12):
        assert not store.has_rows(np.array([3, row]))
        with pytest.raises(ReferenceError, match=f"Row {row} is not"):
            store.read(layer, np.array([3, row]))
        with pytest.raises(ReferenceError, match=f"Row {row} is not"):
            store.read(layer, np.array([row]))
        with pytest.raises(ReferenceError, match=f"Row {row} is not"):
            store.inputs(np.array([3, row]))


def test_names_that_are_not_there(store_path):
    store = Store.open(store_path)
    with pytest.raises(UnknownNameError, match=r'Did you mean "vector"'):
        store.layer("vectr")
    with pytest.raises(UnknownNameError, match=r"no checkpoint 9.*There are: 1, 2"):
        store.weights(9)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8", "bool"])
def test_inputs_come_back(tmp_path, make_layers, make_block, dtype):
    layer = make_layers("float32")[0]
    generator = torch.Generator().manual_seed(1)
    inputs = (torch.randn(20, 2, 3, generator=generator) * 5).abs().to(getattr(torch, dtype))
    with Writer.open(tmp_path) as writer:
        writer.define("Net", (layer,), "float32")
        for split in ("train", "validation"):
            collection = writer.collection(split, None)
            for _ in range(2):
                block = make_block(layer, 10, generator, 0)
                at = collection.rows
                collection.append(np.arange(10), {"vector": block}, np.zeros(10), inputs=inputs[at : at + 10])
            collection.finish()
    store = Store.open(tmp_path)
    rows = np.array([3, 39, 3, 0, 21])
    assert torch.equal(store.inputs(rows), torch.cat([inputs, inputs])[rows])
    assert torch.equal(store.inputs(np.arange(4, 8)), inputs[4:8])


def test_weights_come_back_with_shared_storage(tmp_path):
    weight = torch.randn(3, 4)
    with Writer.open(tmp_path) as writer:
        assert writer.add_checkpoint({"a": weight, "b": weight}, "", 7, {"epoch": 2}) == 1
        assert writer.add_checkpoint({"a": weight + 1}, "", 8, {"epoch": 3}) == 2
    weights = Store.open(tmp_path).weights(1)
    assert torch.equal(weights["a"], weight)
    assert weights["a"].data_ptr() == weights["b"].data_ptr()


def test_several_threads_read_at_once(tmp_path, record, monkeypatch):
    monkeypatch.setattr(collection_writer, "_FLUSH_BYTES", 1)
    store = Store.open(record(tmp_path / "store", rows=200))
    random = np.random.default_rng(0)
    wanted = [random.integers(0, 800, 100) for _ in range(40)]

    def read(rows):
        return [lay_out(layer, store.read(layer, rows)) for layer in store.layers]

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(read, wanted))
    for rows, found in zip(wanted, together, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(found, read(rows), strict=True))


def test_row_bytes_are_those_of_the_files(store_path):
    store = Store.open(store_path)
    assert 40 <= store.row_bytes(store.layer("vector")) < 100
