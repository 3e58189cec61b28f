"""Record batches that stay on a device: the same numbers, within the budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import duckdb
import numpy as np
import pytest
import torch

import metaql
from metaql.errors import QueryError
from metaql.storage.blocks import lay_out
from metaql.storage.store import Store
from metaql.storage.writer import Writer
from metaql.udfs.device import DeviceBlocks, device_of
from tests.conftest import tied_layer

SCORES = "SELECT inner_product(t.gradient, v.gradient) FROM train t, validation v ORDER BY t.sample_id, v.sample_id"

# More than the small store.
LARGE = 1 << 30


@pytest.mark.parametrize("capacity", [0, 500, LARGE])
def test_reads_are_the_stores_within_the_budget(small_store: Path, capacity: int) -> None:
    store = Store.open(small_store)
    blocks = DeviceBlocks(store, torch.device("cpu"), capacity)
    rng = np.random.default_rng(0)
    for _ in range(30):
        first, count = int(rng.integers(0, 25)), int(rng.integers(1, 6))
        for rows in (np.arange(first, first + count), rng.integers(0, store.manifest.next_row, count)):
            for layer in store.layers:
                expected = lay_out(layer, store.read(layer, rows))
                torch.testing.assert_close(lay_out(layer, blocks.read(layer, rows)), expected, rtol=0, atol=0)
                assert blocks.used <= capacity
    assert (blocks.used > 0) == (capacity == LARGE)


def test_a_tied_layer_is_read_part_by_part(tmp_path: Path, record_one_split: Callable[..., None]) -> None:
    with Writer.open(tmp_path) as writer:
        writer.define("Net", (tied_layer(),), "float32")
        record_one_split(writer, np.random.default_rng(0), "train", writer.add_checkpoint({}, "", None, {}), 20)
    store = Store.open(tmp_path)
    (layer,), blocks = store.layers, DeviceBlocks(store, torch.device("cpu"), LARGE)
    for rows in (np.arange(3, 9), np.array([7, 2, 2])):
        expected = lay_out(layer, store.read(layer, rows))
        torch.testing.assert_close(lay_out(layer, blocks.read(layer, rows)), expected, rtol=0, atol=0)
    assert blocks.used > 0


def test_batches_stay(small_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(small_store)
    blocks, reads = DeviceBlocks(store, torch.device("cpu"), LARGE), []
    monkeypatch.setattr(store, "read", lambda layer, rows: reads.append(rows) or Store.read(store, layer, rows))
    for first in (15, 16, 18, 15):
        blocks.read(store.layers[0], np.arange(first, first + 3))
    # The second checkpoint's training samples, which are one record batch.
    assert [rows.tolist() for rows in reads] == [list(range(15, 23))]


@pytest.mark.parametrize("name", ["nonsense", "cuda:99", "cuda" if not torch.cuda.is_available() else "cuda:98"])
def test_a_device_that_is_not_there(small_store: Path, name: str) -> None:
    for open_store in (metaql.connect, lambda path, device: metaql.load(duckdb.connect(), path, device=device)):
        with pytest.raises(QueryError, match=r"can't be used with torch .* leave device out"):
            open_store(small_store, device=name)


def test_the_processor_needs_no_copies() -> None:
    assert device_of("cpu") is None
    assert device_of(None) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_cuda_device_computes_the_same(small_store: Path) -> None:
    with metaql.connect(small_store) as plain, metaql.connect(small_store, device="cuda") as on_device:
        for query in (SCORES, "SELECT norm(avg(gradient)) FROM train"):
            np.testing.assert_allclose(on_device.sql(query).fetchall(), plain.sql(query).fetchall(), rtol=1e-5)
