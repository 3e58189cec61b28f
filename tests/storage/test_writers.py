"""One writer and many readers: locks, conflicts, snapshots, vacuum, dropped checkpoints, overwriting."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from metaql.errors import (
    CommitConflictError,
    InternalError,
    RecordingError,
    ReferenceError,
    StoreLockedError,
    UnknownNameError,
)
from metaql.storage import tables
from metaql.storage.blocks import Factored, Full
from metaql.storage.check import check
from metaql.storage.commit import commit, read_manifest
from metaql.storage.info import info
from metaql.storage.maintenance import drop_checkpoint, vacuum
from metaql.storage.schema import FACTORED, FULL, Layer, Parameter
from metaql.storage.store import Store
from metaql.storage.writer import Writer

LAYER = Layer("fc", "linear", (Parameter("fc.weight", (2, 3)),), FACTORED, "float32", 1, 3, 2, 1)


def blocks(count, value=1.0):
    return {"fc": Factored(torch.full((count, 3), value), torch.full((count, 2), value), count)}


def collect(writer, split="train", checkpoint=None, count=5, value=1.0):
    collection = writer.collection(split, checkpoint)
    collection.append(np.arange(count), blocks(count, value), np.zeros(count))
    return collection.finish()


@pytest.fixture
def writer(tmp_path):
    with Writer.open(tmp_path) as writer:
        writer.define("Net", (LAYER,), "float32")
        yield writer


def test_a_second_writer_in_this_process_is_told_so(tmp_path, writer):
    with pytest.raises(StoreLockedError, match=rf"This process \(pid {os.getpid()}\).*recorder.close"):
        Writer.open(tmp_path)
    for work in (vacuum, lambda path: drop_checkpoint(path, 1), lambda path: Writer.open(path, overwrite=True)):
        with pytest.raises(StoreLockedError):
            work(tmp_path)
    writer.close()
    Writer.open(tmp_path).close()


def test_a_second_writer_in_another_process_is_told_who(tmp_path, writer):
    code = f"from metaql.storage.writer import Writer\nWriter.open({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 1
    message = done.stderr.decode()
    assert f"StoreLockedError: Process {os.getpid()} on {os.uname().nodename} is writing to {tmp_path} since" in message


def test_a_forgotten_writer_gives_its_lock_back(tmp_path):
    forgotten = Writer.open(tmp_path)
    del forgotten
    Writer.open(tmp_path).close()


def test_a_commit_that_was_overtaken_is_refused(tmp_path, writer):
    base = read_manifest(tmp_path)
    commit(tmp_path, base, lambda manifest: manifest)
    after = (tmp_path / "manifests/00000002.json").read_bytes()
    with pytest.raises(CommitConflictError, match=r"version 2, where version 1 was expected"):
        commit(tmp_path, base, lambda manifest: manifest)
    assert (tmp_path / "manifests/00000002.json").read_bytes() == after
    with pytest.raises(CommitConflictError):
        collect(writer)
    assert Store.open(tmp_path).manifest.collections == ()
    assert not list((tmp_path / "collections").iterdir())


def test_readers_see_whole_versions_only(tmp_path, writer):
    first = writer.add_checkpoint({}, "", 1, {})
    collect(writer, "train", first, 5, 1.0)
    before = Store.open(tmp_path)
    collection = writer.collection("validation", first)
    collection.append(np.arange(4), blocks(4, 2.0), np.zeros(4))
    assert Store.open(tmp_path).version == before.version
    assert collection.finish() == 4
    after = Store.open(tmp_path)
    assert len(before.manifest.collections) == 1
    assert not before.has_rows(np.array([5]))
    assert before.read(LAYER, np.arange(5)).prefix.sum() == 10
    assert after.read(LAYER, np.arange(9)).prefix.sum() == 10 + 16
    assert Store.open(tmp_path, before.version).manifest == before.manifest


def test_two_collections_and_a_checkpoint_at_once(tmp_path, writer):
    trajectory = writer.collection("train", None)
    trajectory.append(np.arange(5), blocks(5), np.zeros(5), step=1)
    number = writer.add_checkpoint({}, "", 1, {})
    collect(writer, "validation", number, 3)
    trajectory.append(np.arange(2), blocks(2), np.zeros(2), step=2)
    assert trajectory.rows == 7
    assert trajectory.bytes == 7 * 20
    trajectory.finish()
    store = Store.open(tmp_path)
    assert [one.first_row for one in store.manifest.collections] == [0, 3]
    assert tables.gradients(store).column("step").to_pylist() == [None] * 3 + [1] * 5 + [2] * 2


def test_an_empty_collection_is_harmless(tmp_path, writer):
    assert writer.collection("train", None).finish() == 0
    collect(writer, "train")
    assert writer.collection("train", None).finish() == 0
    store = Store.open(tmp_path)
    assert store.has_rows(np.arange(5))
    assert not store.has_rows(np.arange(6))
    assert tables.samples(store).num_rows == 5
    assert store.read(LAYER, np.arange(5)).samples == 5


def test_an_aborted_collection_leaves_nothing(tmp_path, writer):
    collection = writer.collection("train", None)
    collection.append(np.arange(5), blocks(5), np.zeros(5))
    collection.abort()
    collection.abort()
    with pytest.raises(RecordingError, match=r"closed"):
        collection.finish()
    assert not list((tmp_path / "recording").iterdir())
    other = writer.collection("train", None)
    writer.close()
    with pytest.raises(RecordingError, match=r"closed"):
        other.append(np.arange(5), blocks(5), np.zeros(5))
    assert not list((tmp_path / "recording").iterdir())


def test_a_run_is_continued(tmp_path, writer):
    collect(writer, "train", writer.add_checkpoint({}, "", 1, {}))
    writer.close()
    store = Store.open(tmp_path)
    with Writer.open(tmp_path) as again:
        assert again.manifest == store.manifest
        again.define("Net", (LAYER,), "float32")
        assert again.add_checkpoint({}, "", 2, {}) == 2
        collect(again, "train", 2)
    assert Store.open(tmp_path).id == store.id
    assert Store.open(tmp_path).manifest.next_row == 10


def test_another_model_is_refused(tmp_path, writer):
    collect(writer)
    other = Layer("other", "norm", (Parameter("other.weight", (2,)),), FULL, "float32")
    with pytest.raises(RecordingError, match=r"another model.*\(Net, here Mlp\): fc, other differ.*overwrite=True"):
        writer.define("Mlp", (other,), "float32")


def test_an_overwritten_store_is_another(tmp_path, writer):
    collect(writer, "train", writer.add_checkpoint({}, "", 1, {}))
    writer.close()
    old = Store.open(tmp_path)
    with Writer.open(tmp_path, overwrite=True) as writer:
        assert writer.manifest.collections == ()
        writer.define("Net", (LAYER,), "float32")
        assert writer.add_checkpoint({}, "", 1, {}) == 1
        collect(writer, "train", 1, 5, 7.0)
    new = Store.open(tmp_path)
    assert new.id != old.id
    assert new.read(LAYER, np.arange(5)).prefix.unique() == 7
    with pytest.raises(ReferenceError, match=r"connect again"):
        old.read(LAYER, np.arange(5))
    assert list(check(tmp_path)) == []


def test_a_dropped_checkpoint_takes_its_collections_along(tmp_path, writer):
    for _ in range(2):
        collect(writer, "train", writer.add_checkpoint({"w": torch.ones(1000)}, "", 1, {}))
    writer.close()
    before = Store.open(tmp_path)
    drop_checkpoint(tmp_path, 1)
    store = Store.open(tmp_path)
    assert [one.number for one in store.manifest.checkpoints] == [2]
    assert not store.has_rows(np.array([0]))
    with pytest.raises(ReferenceError, match=r"Row 0 is not, or no longer"):
        store.read(LAYER, np.arange(5))
    assert before.read(LAYER, np.arange(5)).samples == 5
    with pytest.raises(UnknownNameError, match=r"no checkpoint 1 .*There are: 2"):
        drop_checkpoint(tmp_path, 1)
    with Writer.open(tmp_path) as again:
        assert again.add_checkpoint({}, "", 3, {}) == 3
        collect(again, "train", 3)
    assert Store.open(tmp_path).has_rows(np.arange(5, 15))


def test_vacuum_frees_what_only_older_versions_name(tmp_path, writer):
    for _ in range(2):
        collect(writer, "train", writer.add_checkpoint({"w": torch.ones(1000)}, "", 1, {}))
    writer.close()
    old, untouched = Store.open(tmp_path), Store.open(tmp_path)
    kept = old.read(LAYER, np.arange(5))
    drop_checkpoint(tmp_path, 1)
    before = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    freed = vacuum(tmp_path)
    after = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    assert freed == before - after > 4000
    assert vacuum(tmp_path) == 0
    assert kept.prefix.sum() == 10
    assert torch.equal(old.read(LAYER, np.arange(5)).prefix, kept.prefix)
    for work in (lambda: untouched.read(LAYER, np.arange(5)), lambda: untouched.weights(1)):
        with pytest.raises(ReferenceError, match=r"was vacuumed.*connect again"):
            work()
    current = Store.open(tmp_path)
    assert current.read(LAYER, np.arange(5, 10)).samples == 5
    assert list(check(tmp_path)) == []
    assert info(tmp_path).versions == (current.version,)


def test_info_says_what_there_is(store_path):
    text = str(info(store_path))
    assert "Net, 8 layers" in text
    assert "version      7, 6 older" in text
    assert text.count("40 rows") == 4


@pytest.mark.parametrize(
    "block",
    [
        None,
        Factored(torch.ones(4, 3), torch.ones(4, 2), 4),
        Factored(torch.ones(5, 4), torch.ones(5, 2), 5),
        Factored(torch.ones(5, 3), torch.ones(5, 3), 5),
        Factored(torch.ones(5, 3), torch.ones(5, 2), 5, torch.tensor([0, 1, 2, 3, 4, 6])),
        Full(torch.ones(5, 6)),
    ],
)
def test_a_block_that_does_not_fit_its_layer_is_not_stored(writer, block):
    collection = writer.collection("train", None)
    with pytest.raises(InternalError, match=r"'fc'"):
        collection.append(np.arange(5), {"fc": block} if block else {}, np.zeros(5))
    collection.append(np.arange(5), blocks(5), np.zeros(5))
    assert collection.finish() == 5


def test_settings_that_can_not_be_kept(writer):
    for bad in (float("nan"), torch.ones(2), object()):
        with pytest.raises(RecordingError, match=r"settings of a checkpoint"):
            writer.add_checkpoint({}, "", 1, {"bad": bad})
    assert writer.add_checkpoint({}, "", 1, {"good": None}) == 1
