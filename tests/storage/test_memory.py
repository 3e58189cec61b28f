"""A store is read by mapping it: what a process reads does not become its own memory."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import torch

from metaql.storage.blocks import Factored
from metaql.storage.schema import FACTORED, Layer, Parameter
from metaql.storage.writer import Writer

ROWS = 75_000
READ = """
import sys
import numpy as np
from metaql.storage import tables
from metaql.storage.store import Store

def anonymous():
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1e3

store = Store.open(sys.argv[1])
layer = store.layers[0]
store.read(layer, np.arange(10))
before, peak = anonymous(), 0
random = np.random.default_rng(0)
for first in range(0, 75_000, 2048):
    rows = np.arange(first, min(first + 2048, 75_000))
    store.read(layer, rows).prefix.sum()
    store.read(layer, random.permutation(75_000)[:2048]).prefix.sum()
    peak = max(peak, anonymous())
tables.gradients(store), tables.samples(store)
print(max(peak, anonymous()) - before)
"""


def test_reading_150_megabytes_takes_few_of_its_own(tmp_path):
    layer = Layer("fc", "linear", (Parameter("fc.weight", (256, 256)),), FACTORED, "float32", 1, 256, 256, 1)
    block = Factored(torch.ones(1000, 256), torch.ones(1000, 256), 1000)
    with Writer.open(tmp_path) as writer:
        writer.define("Net", (layer,), "float32")
        collection = writer.collection("train", None)
        for first in range(0, ROWS, 1000):
            collection.append(np.arange(first, first + 1000), {"fc": block}, np.zeros(1000), step=1)
        collection.finish()
    assert sum(path.stat().st_size for path in tmp_path.rglob("*.arrow")) > 150e6
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", READ, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 50
