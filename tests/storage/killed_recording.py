"""Records, is killed at a random moment, checks what is left, and goes on: a program, run by test_crash.py.

    python killed_recording.py FOLDER ROUNDS SEED

It imports once and stays single-threaded; each recording and each check is a forked child. A collection's
contents follow from the number that stands in its split's name, so that a checker needs nothing else.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
import traceback
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from metaql.errors import NotAStoreError
from metaql.storage import collection_writer, tables
from metaql.storage.blocks import Factored, Full
from metaql.storage.check import check
from metaql.storage.maintenance import drop_checkpoint, vacuum
from metaql.storage.schema import FACTORED, FULL, Layer, Parameter
from metaql.storage.store import Store
from metaql.storage.writer import Writer

LAYERS = (
    Layer("words", "linear", (Parameter("words.weight", (3, 5)),), FACTORED, "float32", 1, 5, 3),
    Layer("fellow", "linear", (Parameter("fellow.weight", (2, 5)),), FACTORED, "float32", 1, 5, 2),
    Layer("scale", "norm", (Parameter("scale.weight", (8,)),), FULL, "float32"),
)
ROUNDS_PER_STORE = 10


def contents(number):
    """The ids and blocks of a collection: two batches of some tens of samples."""
    generator = torch.Generator().manual_seed(number)
    batches = []
    for first in (0, 1000):
        count = 20 + number % 17
        lengths = torch.randint(0, 6, (count,), generator=generator)
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        positions = int(offsets[-1])
        suffix, prefix = torch.randn(positions, 5, generator=generator), torch.randn(positions, 3, generator=generator)
        blocks = {
            "words": Factored(suffix, prefix, count, offsets),
            "fellow": Factored(suffix, prefix[:, :2] + 1, count, offsets),
            "scale": Full(torch.randn(count, 8, generator=generator)),
        }
        batches.append((np.arange(first, first + count), blocks))
    return batches


def record(folder, done):
    """Records until killed; writes each collection's number and checkpoint to ``done`` once it is committed."""
    warnings.simplefilter("ignore")  # of what the last one left
    os.write(done, b"begun\n")
    while True:
        with Writer.open(folder) as writer:
            writer.define("Net", LAYERS, "float32")
            checkpoint = writer.add_checkpoint(
                {"w": torch.full((50,), float(len(writer.manifest.checkpoints)))}, "", 1, {}
            )
            for _ in range(3):
                number = writer.manifest.next_collection
                collection = writer.collection(f"number {number}", checkpoint)
                for ids, blocks in contents(number):
                    collection.append(ids, blocks, np.full(len(ids), number))
                rows = collection.rows
                collection.finish(pa.table({"sample_id": list(range(rows)), "label": list(range(rows))}))
                os.write(done, f"{number} {checkpoint}\n".encode())
        if is_dropped(checkpoint):
            drop_checkpoint(folder, checkpoint)
            vacuum(folder)


def is_dropped(checkpoint):
    """Whether ``record`` drops this checkpoint once its collections are done."""
    return checkpoint % 3 == 0


def verify(folder, done):
    """Every committed collection is there and exact, and nothing else is to be seen."""
    try:
        store = Store.open(folder)
    except NotAStoreError:
        assert not done, "the store does not open, though something was committed"
        return
    assert list(check(folder)) == []
    manifest = store.manifest
    numbers = {collection.number for collection in manifest.collections}
    assert {number for number, checkpoint in done if not is_dropped(checkpoint)} <= numbers
    # One more may be committed than was reported, never two.
    assert manifest.next_collection - 1 <= max((number for number, _ in done), default=0) + 1
    kept = {checkpoint.number for checkpoint in manifest.checkpoints}
    assert {collection.checkpoint for collection in manifest.collections} <= kept
    for checkpoint in manifest.checkpoints:
        assert store.weights(checkpoint.number)["w"].shape == (50,)
    for collection in manifest.collections:
        verify_collection(store, collection)
    assert tables.gradients(store).num_rows == sum(collection.rows for collection in manifest.collections)
    samples = tables.samples(store)
    assert samples.num_rows == sum(collection.rows for collection in manifest.collections)


def verify_collection(store, collection):
    batches = contents(int(collection.split.removeprefix("number ")))
    assert collection.split == f"number {collection.number}"
    assert collection.rows == sum(len(ids) for ids, _ in batches)
    first = collection.first_row
    assert {one.suffix_of for one in collection.segments if one.layer == "fellow"} == {"words"}
    for ids, blocks in batches:
        rows = np.arange(first, first + len(ids))
        for layer in LAYERS[:2]:
            found, expected = store.read(layer, rows), blocks[layer.name]
            assert torch.equal(found.suffix, expected.suffix)
            assert torch.equal(found.prefix, expected.prefix)
            assert torch.equal(found.offsets, expected.offsets)
        assert torch.equal(store.read(LAYERS[2], rows).gradient, blocks["scale"].gradient)
        first += len(ids)
    ids = store.table(collection.row_file).column("sample_id").to_numpy()
    assert (ids == np.concatenate([ids for ids, _ in batches])).all()


def fork(work):
    """Runs ``work`` in a child and gives its process id; its exit status is 1 when it raises."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def kill_once(folder, moment=None):
    """Starts a recording and kills it after ``moment`` seconds, or else after three collections.

    Gives what it reported as committed, and how long it ran.
    """
    read, write = os.pipe()
    pid = fork(partial(record, folder, write))
    os.close(write)
    with open(read) as lines:
        assert lines.readline() == "begun\n"
        begin = time.monotonic()
        reported = [lines.readline() for _ in range(3)] if moment is None else []
        time.sleep(moment or 0)
        os.kill(pid, signal.SIGKILL)
        seconds = time.monotonic() - begin
        _, status = os.waitpid(pid, 0)
        assert os.WIFSIGNALED(status), "the recording ended by itself: see its error above"
        return [tuple(map(int, line.split())) for line in [*reported, *lines]], seconds


def main(folder, rounds, seed):
    moments = random.Random(seed)
    # The limits of a real recording are megabytes; these make every append write.
    collection_writer._FLUSH_BYTES = 500
    _, seconds = kill_once(folder)
    done, collections = [], 0
    for number in range(rounds):
        if number % ROUNDS_PER_STORE == 0:
            shutil.rmtree(folder)
            done = []
        reported, _ = kill_once(folder, moments.uniform(0, 1.5 * seconds))
        done += reported
        collections += len(reported)
        _, status = os.waitpid(fork(partial(verify, folder, done)), 0)
        assert status == 0, f"round {number} of seed {seed}: see the error above"
    print(f"{rounds} kills, {collections} collections")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
