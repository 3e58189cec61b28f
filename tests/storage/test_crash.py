"""A recording killed at any moment leaves a store that opens and holds exactly what was committed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metaql.errors import NotAStoreError
from metaql.storage.check import check
from metaql.storage.store import Store
from metaql.storage.writer import Writer

KILLS = 30


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_at_random_moments(tmp_path):
    program = start(Path(__file__).with_name("killed_recording.py"), tmp_path / "store", KILLS, 1)
    out, err = program.communicate(timeout=300)
    assert program.returncode == 0, err
    kills, collections = (int(word) for word in out.split() if word.isdigit())
    assert kills == KILLS
    assert collections > KILLS // 3


def test_what_was_cut_off_is_named_and_removed(store_path, make_layers, make_block):
    layers = make_layers("float32")
    before = Store.open(store_path).version
    writer = Writer.open(store_path)
    collection = writer.collection("extra", 2)
    blocks = {layer.name: make_block(layer, 9, torch.Generator().manual_seed(0), 0) for layer in layers}
    collection.append(np.arange(9), blocks, np.zeros(9))
    collection._flush_all()
    collection._background.drain()
    writer._lock.release()  # as the system does when a process dies
    assert list(check(store_path)) == []
    assert Store.open(store_path).version == before
    with pytest.warns(UserWarning, match=r"split 'extra' at checkpoint 2 \(10 files, 0.0 MB\).*committed is intact"):
        Writer.open(store_path).close()
    assert list((store_path / "recording").iterdir()) == []
    Writer.open(store_path).close()
    collection.abort()


def test_a_store_whose_first_commit_was_cut_off_begins_anew(tmp_path):
    (tmp_path / "manifests").mkdir()
    (tmp_path / "manifests" / "00000001.json.tmp").write_text("{")
    (tmp_path / "writer.lock").touch()
    with pytest.raises(NotAStoreError, match=r"yet"):
        Store.open(tmp_path)
    Writer.open(tmp_path).close()
    assert Store.open(tmp_path).version == 1


def test_a_forked_child_does_not_keep_its_dead_parents_lock(tmp_path):
    program = start(
        "-c",
        "import os, sys, time\n"
        "from metaql.storage.writer import Writer\n"
        f"writer = Writer.open({str(tmp_path)!r})\n"
        "if os.fork() == 0:\n"
        "    time.sleep(1)\n"
        "    print('forked', os.getpid(), flush=True)\n"
        "    os.close(1); os.close(2); time.sleep(60)\n"
        "time.sleep(60)\n",
    )
    child = int(program.stdout.readline().split()[1])
    program.kill()
    program.wait()
    try:
        Writer.open(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        program.stdout.close()
        program.stderr.close()
