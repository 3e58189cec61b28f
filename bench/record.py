"""What does recording at a checkpoint cost beside the same forward and backward passes without it?

Two networks, that of the demonstration and an MLP of three layers, 512 wide; plain passes and ``collect`` over the same
batches in turns. ``collect`` ends with a commit, synced to the disk. Exits with 1 when a median of ratios exceeds the
limit or a recorded gradient differs from autograd's.

    python -m bench.record                       # two threads, 10,000 samples
    python -m bench.record --threads 1 --samples 2000
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metaql
from metaql.demo import Network
from metaql.storage.blocks import lay_out
from metaql.storage.store import Store

LIMIT = 1.5
BATCH = 256


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    """name => network and the shape of its inputs."""
    wide = [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)]
    return {"demo network": (Network(), (1, 8, 8)), "MLP 3 x 512": (nn.Sequential(*wide), (512,))}


def passes(model: nn.Module, batches: list[tuple[Tensor, tuple[Tensor, Tensor]]]) -> None:
    """Forward and backward over all batches, as a training loop does them."""
    for _, (inputs, targets) in batches:
        model.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU time of one call, the latter of all threads."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def is_exact(model: nn.Module, store: Store, batch: tuple[Tensor, Tensor]) -> bool:
    """Whether the first samples' gradients are those of autograd."""
    for row in range(5):
        model.zero_grad()
        F.cross_entropy(model(batch[0][row : row + 1]), batch[1][row : row + 1]).backward()
        expected = torch.cat([each.grad.flatten() for each in model.parameters() if each.grad is not None])
        got = torch.cat([lay_out(layer, store.read(layer, np.array([row])))[0] for layer in store.layers])
        if float((got - expected).norm() / expected.norm()) > 1e-5:
            return False
    return True


def compare(name: str, model: nn.Module, shape: tuple[int, ...], samples: int, rounds: int) -> bool:
    """Prints the ratios for one network; whether they and the gradients are as they should be."""
    inputs, targets = torch.randn(samples, *shape), torch.randint(0, 10, (samples,))
    batches = [(ids, (inputs[ids], targets[ids])) for ids in torch.arange(samples).split(BATCH)]
    walls, cpus, plain = [], [], []
    with tempfile.TemporaryDirectory() as folder, metaql.Recorder(model, Path(folder) / "store") as recorder:
        recorder.checkpoint()
        for number in range(rounds + 1):
            without, of_cpu = seconds(lambda: passes(model, batches))
            recorded, of_cpu_recorded = seconds(lambda split=f"split{number}": recorder.collect(batches, split))
            if number:  # the first round warms up
                walls.append(recorded / without)
                cpus.append(of_cpu_recorded / of_cpu)
                plain.append(without)
        store = Store.open(Path(folder) / "store")
        exact = is_exact(model, store, (inputs, targets))
        stored = sum(segment.file.bytes for each in store.manifest.collections for segment in each.segments)
        store.close()
    wall, cpu = statistics.median(walls), statistics.median(cpus)
    print(
        f"{name}: {samples} samples, plain passes {statistics.median(plain) * 1e3:.0f} ms, "
        f"{stored / (rounds + 1) / samples / 1e3:.1f} kB a sample; recording takes {wall:.2f}x the time "
        f"({min(walls):.2f} to {max(walls):.2f}) and {cpu:.2f}x the CPU time; "
        f"gradients {'agree' if exact else 'DIFFER'}"
    )
    return exact and wall <= LIMIT


def main() -> int:
    """Prints the figures; 0 when they are within the limit and the gradients agree."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{datetime.now(UTC):%Y-%m-%d} {platform.processor() or platform.machine()}, {options.threads} threads, "
          f"torch {torch.__version__}")  # fmt: skip
    good = [compare(name, model, shape, options.samples, options.rounds) for name, (model, shape) in networks().items()]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
