"""What the ranks of test_distributed.py do."""

from __future__ import annotations

import os
import signal
from contextlib import nullcontext

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

import metaql
from tests.recording.reference import by_loop

SAMPLES = 23
METADATA = {"sample_id": list(range(SAMPLES)), "source": [f"web {each % 3}" for each in range(SAMPLES)]}


class Network(nn.Module):
    """A table, a batch norm, a scale without factors, and a layer that only samples of length 3 need."""

    def __init__(self):
        super().__init__()
        self.words, self.hidden, self.head = nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 3)
        self.norm, self.rare = nn.BatchNorm1d(6), nn.Linear(4, 4)
        self.double()

    def forward(self, words):
        h = self.words(words)
        h = (self.rare(h) if words.shape[1] == 3 else h).mean(1)
        return self.head(torch.tanh(self.norm(self.hidden(h))))


def network():
    torch.manual_seed(1)
    return Network().eval()


def data():
    generator = torch.Generator().manual_seed(2)
    words = torch.randint(0, 7, (SAMPLES, 5), generator=generator)
    return words, torch.randint(0, 3, (SAMPLES,), generator=generator)


def recorder(model, path, **options):
    return metaql.Recorder(model, path, dtype="float64", **{"layers": ["words", "hidden", "norm", "head"], **options})


def ddp(model, **options):
    return DistributedDataParallel(model, **{"find_unused_parameters": True, **options})


def pairs(ids, size=4):
    """(ids, batch) of these samples."""
    words, targets = data()
    for begin in range(0, len(ids), size):
        chosen = ids[begin : begin + size]
        yield chosen, (words[chosen], targets[chosen])


def collect(rank, path, wrap=True):
    """Two splits at a checkpoint: a Dataset, with metadata on rank 0 alone, and shares of the ranks' own."""
    model = ddp(network()) if wrap else network()
    size = torch.distributed.get_world_size() if wrap else 1
    with recorder(model, path, inputs=True) as made:
        number = made.checkpoint(torch.optim.SGD(model.parameters(), lr=0.1), epoch=3)
        rows = made.collect(TensorDataset(*data()), "train", METADATA if rank == 0 else None, batch_size=4)
        own = np.arange(10)[rank::size]
        return number, rows, made.collect(pairs(own), "validation")


def keep_outputs(rank, path):
    """Estimates of a Dataset and of the ranks' own, which are given, and a recording with logits and embeddings."""
    own = np.arange(SAMPLES)[rank::2]
    with recorder(ddp(network()), path) as made:
        foretold = made.estimate(TensorDataset(*data()), batch_size=4), made.estimate(list(pairs(own)))
        made.checkpoint()
        made.collect(TensorDataset(*data()), "train", batch_size=4, logits=True, embeddings=["hidden", ""])
        return [(each.samples, each.bytes) for each in foretold]


def gather_curvature(rank, path, wrap=True):
    """Curvature of the data's own targets; and how many samples it is of."""
    with recorder(ddp(network()) if wrap else network(), path) as made:
        made.checkpoint()
        made.collect(TensorDataset(*data()), "train", batch_size=4)
        return made.curvature(TensorDataset(*data()), labels="recorded", batch_size=4)


def train(rank, path, find_unused, static_graph, accumulate, record=True):
    """Five updates, the last on shares of different sizes, with a collection amid them.

    Gives what each step's own samples had for gradients by the loop, the steps' sizes, and the weights at the end.
    """
    size = torch.distributed.get_world_size()
    model = network()
    model.rare.requires_grad_(find_unused)
    model = ddp(model, find_unused_parameters=find_unused, static_graph=static_graph)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    words, targets = data()
    order = np.random.default_rng(0).permutation(SAMPLES)
    expected, number = {}, 0
    with recorder(model, path) if record else nullcontext() as made:
        for update in range(5):
            optimizer.zero_grad()
            for part in range(accumulate):
                count = 2 + (rank if update == 4 else 0)
                ids = np.roll(order, number * 5)[rank * 3 :][:count]
                number += 1
                batch = (words[ids], targets[ids])
                factors = torch.full((count,), 1 / (count * accumulate), dtype=torch.float64)
                reduction = factors if accumulate > 1 else "mean"
                for name, each in by_loop(model.module, batch, count).items():
                    expected.update({(name, number, int(sample)): row for sample, row in zip(ids, each, strict=True)})
                with (
                    model.no_sync() if part < accumulate - 1 else nullcontext(),
                    made.step(ids, optimizer, reduction=reduction) if record else nullcontext(),
                ):
                    # By indices, so that rows have to be found again behind what DistributedDataParallel puts last.
                    losses = -model(batch[0]).log_softmax(1)[torch.arange(count), torch.as_tensor(batch[1])]
                    (losses * factors).sum().backward()
            optimizer.step()
            if record and update == 2:
                made.checkpoint(optimizer)
                made.collect(TensorDataset(words, targets), "validation", batch_size=4)
    assert size > 1
    return expected, dict(model.module.state_dict())


def collect_few(rank, path, wrap=True):
    """Fewer samples than ranks, of which rank 0 has none."""
    words, targets = data()
    with recorder(ddp(network()) if wrap else network(), path) as made:
        made.checkpoint()
        return made.collect(TensorDataset(words[:2], targets[:2]), "train", METADATA)


def collect_nothing(rank, path):
    with recorder(ddp(network()), path) as made:
        made.checkpoint()
        made.collect([], "train")


def fail(rank, path, failing, failure):
    """A checkpoint and a collection that are well, then one in which a rank fails."""
    model = ddp(network())

    def share():
        for number, pair in enumerate(pairs(np.arange(SAMPLES)[rank :: torch.distributed.get_world_size()])):
            yield failure(*pair) if (rank, number) == (failing, 1) else pair

    with recorder(model, path) as made:
        made.checkpoint()
        made.collect(TensorDataset(*data()), "validation", batch_size=4)
        made.collect(share(), "train")


def broken(ids, batch):
    raise FloatingPointError("the third word is broken")


def interrupted(ids, batch):
    signal.raise_signal(signal.SIGINT)


def killed(ids, batch):
    os.kill(os.getpid(), signal.SIGKILL)


def anothers(ids, batch):
    """A sample that rank 0 has as well."""
    return np.array([0]), (batch[0][:1], batch[1][:1])


def empty(ids, batch):
    return ids[:0], batch


def refused(rank, path, what):
    """What a recorder says to ranks that are not of one mind."""
    model = ddp(network())
    if what == "another folder" and rank == 1:
        path = path.with_name("elsewhere")
    with recorder(model, path) as made:
        made.checkpoint()
        words, targets = data()
        if what == "another method" and rank == 1:
            made.checkpoint()
        if what == "different data" and rank == 1:
            words, targets = words[1:], targets[1:]
        known = {"sample_id": [0], "source": ["web" if rank else 1]} if what == "metadata of two types" else None
        split = "test" if what == "another split" and rank == 1 else "train"
        made.collect(TensorDataset(words, targets), split, known, batch_size=4)


def failing_step(rank, path, where):
    """Three steps that are well and one in which rank 1 fails: within the pass, or because of what it brings."""
    model = ddp(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with recorder(model, path) as made:
        for number, (ids, batch) in enumerate(pairs(np.arange(16)[rank::2], 2)):
            with made.step(ids, optimizer):
                loss = F.cross_entropy(model(batch[0]), batch[1])
                if (rank, number, where) == (1, 3, "before"):
                    raise ValueError("a bad batch")
                if (rank, number, where) == (1, 3, "gradient"):
                    loss = loss * torch.inf
                loss.backward()
            optimizer.step()


def sharded(rank, path, whole_module):
    """What a recorder says to a model whose parameters are spread over the ranks."""
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    if whole_module:
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    else:
        fully_shard(model)
    metaql.Recorder(model, path)


def normalised(rank, path):
    """Statistics that differ from rank to rank after each training pass; gives those of all ranks at the end."""
    model = ddp(network().train())
    with recorder(model, path) as made:
        words, targets = data()
        F.cross_entropy(model(words[rank::2]), targets[rank::2]).backward()
        before = model.module.norm.running_mean.clone()
        model.eval()
        made.checkpoint()
        made.collect(TensorDataset(words, targets), "train", batch_size=4)
    return before, dict(model.module.state_dict())
