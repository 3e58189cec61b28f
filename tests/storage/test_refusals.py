"""A disk that is full and a Ctrl-C: an error, everything committed intact, nothing half-written left."""

from __future__ import annotations

import random
import signal
import time

import numpy as np
import pytest
import torch

from metaql.errors import BatchError, RecordingError, WriteError
from metaql.storage import commit
from metaql.storage.blocks import Full
from metaql.storage.check import check
from metaql.storage.maintenance import vacuum
from metaql.storage.schema import FULL, Layer, Parameter
from metaql.storage.store import Store
from metaql.storage.writer import Writer
from tests.storage.full_disk import room_for

LAYERS = tuple(Layer(name, "norm", (Parameter(name, (250,)),), FULL, "float32") for name in "ab")


def blocks(count):
    return {layer.name: Full(torch.ones(count, 250)) for layer in LAYERS}


@pytest.fixture
def writer(tmp_path):
    with Writer.open(tmp_path) as writer:
        writer.define("Net", LAYERS, "float32")
        collection = writer.collection("train", writer.add_checkpoint({}, "", 1, {}))
        collection.append(np.arange(50), blocks(50), np.zeros(50))
        collection.finish()
        yield writer


def assert_only_the_first(path):
    store = Store.open(path)
    assert [one.rows for one in store.manifest.collections] == [50]
    assert store.read(LAYERS[1], np.arange(50)).gradient.sum() == 50 * 250
    assert list(check(path)) == []
    assert not list((path / "recording").iterdir())
    assert len(list((path / "collections").iterdir())) == 1
    assert not list(path.rglob("*.tmp"))


def append_until_refused(collection):
    for _ in range(1000):
        collection.append(np.arange(50), blocks(50), np.zeros(50))


def test_the_disk_fills_up_while_appending(tmp_path, writer, monkeypatch):
    monkeypatch.setattr("metaql.storage.collection_writer._FLUSH_BYTES", 1)
    collection = writer.collection("train", 1)
    with room_for(100_000), pytest.raises(WriteError, match=r"recording/.*File too large.*committed .* is intact"):
        append_until_refused(collection)
    collection.abort()
    assert_only_the_first(tmp_path)


def test_the_disk_fills_up_at_the_end(tmp_path, writer):
    collection = writer.collection("train", 1)
    collection.append(np.arange(500), blocks(500), np.zeros(500))
    with room_for(100_000), pytest.raises(WriteError, match=r"intact"):
        collection.finish()
    assert_only_the_first(tmp_path)
    again = writer.collection("train", 1)
    again.append(np.arange(500), blocks(500), np.zeros(500))
    assert again.finish() == 500


@pytest.mark.parametrize("file", ["manifests/00000004.json", "HEAD"])
def test_the_disk_fills_up_in_the_commit(tmp_path, writer, monkeypatch, file):
    replace_file = commit.replace_file

    def refuse(path, data):
        if path == tmp_path / file:
            raise OSError(28, "No space left on device", str(path))
        replace_file(path, data)

    collection = writer.collection("train", 1)
    collection.append(np.arange(500), blocks(500), np.zeros(500))
    monkeypatch.setattr(commit, "replace_file", refuse)
    with pytest.raises(WriteError, match=r"No space left"):
        collection.finish()
    assert_only_the_first(tmp_path)
    monkeypatch.undo()
    assert writer.add_checkpoint({}, "", 2, {}) == 2


def test_the_disk_has_no_room_for_a_checkpoint(tmp_path, writer):
    with room_for(100_000), pytest.raises(WriteError, match=r"00000002.pt.*intact"):
        writer.add_checkpoint({"w": torch.ones(100_000)}, "", 2, {})
    assert_only_the_first(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00000001.pt"]
    assert writer.add_checkpoint({"w": torch.ones(100_000)}, "", 2, {}) == 2


def test_a_full_disk_can_be_vacuumed(tmp_path, writer):
    writer.close()
    with room_for(0):
        assert vacuum(tmp_path) > 0
    assert_only_the_first(tmp_path)


def test_a_folder_that_may_not_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"file"):
        Writer.open(tmp_path / "file" / "store")


def test_inputs_of_another_shape(writer):
    collection = writer.collection("train", 1)
    collection.append(np.arange(5), blocks(5), np.zeros(5), inputs=torch.ones(5, 3))
    for inputs in (torch.ones(5, 4), torch.ones(5, 3).double(), torch.ones(4, 3), None):
        with pytest.raises(BatchError):
            collection.append(np.arange(5), blocks(5), np.zeros(5), inputs=inputs)
    assert collection.finish() == 5


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_torn_append_is_never_committed(tmp_path, writer, monkeypatch):
    collection = writer.collection("train", 1)
    collection.append(np.arange(5), blocks(5), np.zeros(5))
    # After the first layer.
    monkeypatch.setattr(collection._bundles[1].staging, "append", interrupted)
    with pytest.raises(KeyboardInterrupt):
        collection.append(np.arange(5), blocks(5), np.zeros(5))
    monkeypatch.undo()
    for work in (collection.finish, lambda: collection.append(np.arange(5), blocks(5), np.zeros(5))):
        with pytest.raises(RecordingError, match=r"torn"):
            work()
    writer.close()
    assert_only_the_first(tmp_path)


def record_until_interrupted(path, committed):
    """Gives how many collections it knows to be committed; so many are when it begins."""
    try:
        with Writer.open(path) as writer:
            writer.define("Net", LAYERS, "float32")
            # Not for ever: an interrupt that comes while the collector runs is only told of.
            end = time.monotonic() + 2
            while time.monotonic() < end:
                collection = writer.collection("train", None)
                for _ in range(3):
                    collection.append(np.arange(20), blocks(20), np.zeros(20))
                collection.finish()
                committed += 1
        return committed
    except KeyboardInterrupt:
        return committed


# An interrupt between the opening of a file and the block that closes it leaves that to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:The last recording")
def test_interrupts_at_random_moments(tmp_path, monkeypatch):
    monkeypatch.setattr("metaql.storage.collection_writer._FLUSH_BYTES", 1)
    moments = random.Random(4)
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    Writer.open(tmp_path / "0").close()
    try:
        for number in range(24):
            path = tmp_path / str(number // 8)
            Writer.open(path).close()
            already = len(Store.open(path).manifest.collections)
            signal.setitimer(signal.ITIMER_REAL, moments.uniform(0.001, 0.15))
            committed = record_until_interrupted(path, already)
            store = Store.open(path)
            # An interrupt may come between the commit and our counting it.
            assert len(store.manifest.collections) in (committed, committed + 1)
            assert {one.rows for one in store.manifest.collections} <= {60}
            assert list(check(path)) == []
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(store.manifest.collections) > 1
