"""Real data and a trained network for each case."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bench.data import cifar10, fashion_mnist
from bench.peers.case import NETWORKS, Case

EPOCHS, BATCH = 3, 100


def case(network: str, rows: int, queries: int) -> Case:
    """Trained for three epochs on the first ``rows`` training samples; two sets of ``queries`` test samples."""
    read = cifar10 if network.startswith("VGG") else fashion_mnist
    inputs, labels = (each[:rows].clone() for each in read("train"))
    asked = [tuple(each[first : first + queries].clone() for each in read("test")) for first in (0, queries)]
    torch.manual_seed(0)
    model = NETWORKS[network]()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(EPOCHS):
        for ids in torch.randperm(rows).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[ids]), labels[ids]).backward()
            optimizer.step()
    return Case(network, model.state_dict(), (inputs, labels), asked)
