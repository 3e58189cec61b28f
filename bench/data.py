"""Real data, read as published from the folder that ``METAQL_DATA`` names (bench/README.md says what to fetch)."""

from __future__ import annotations

import csv
import gzip
import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Of all five training batches.
CIFAR_MEAN, CIFAR_DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
FOLDER = Path(os.environ.get("METAQL_DATA", Path(__file__).parents[2] / "shared" / "data"))
PADDING, UNKNOWN, START, SEPARATOR = 0, 1, 2, 3


def path(name: str) -> Path:
    """A file of the data; ends the benchmark with what to do where there is none."""
    if not (FOLDER / name).exists():
        sys.exit(
            f"There is no {name} in {FOLDER}. Set METAQL_DATA to a folder with it; bench/README.md says where from."
        )
    return FOLDER / name


@cache
def cifar10(split: str) -> tuple[Tensor, Tensor]:
    """Images float32 [n, 3, 32, 32], normalised, and labels int64 [n]; "train" is batches 1 and 2, "test" 10,000."""
    files = ["test_batch"] if split == "test" else ["data_batch_1", "data_batch_2"]
    parts = [_cifar_batch(path(f"cifar10/{name}.npz")) for name in files]
    images = torch.from_numpy(np.concatenate([pixels for pixels, _ in parts])).float() / 255
    labels = torch.from_numpy(np.concatenate([label for _, label in parts]).astype(np.int64))
    mean, deviation = (torch.tensor(each).reshape(3, 1, 1) for each in (CIFAR_MEAN, CIFAR_DEVIATION))
    return (images - mean) / deviation, labels


def _cifar_batch(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as loaded:
        labels = loaded["label"]
        pixels = loaded["d"]
    # The pixels are stored differenced, channels against the green one.
    pixels = np.cumsum(np.cumsum(pixels, 3, dtype=np.uint8), 2, dtype=np.uint8)
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    return pixels, labels


def cifar10n(kind: str) -> Tensor:
    """Human labels of the training images in order, int64 [50,000]; "aggre_label", "random_label1", "worse_label", …"""
    with np.load(path("cifar10n/cifar10n.npz")) as loaded:
        return torch.from_numpy(loaded[kind].astype(np.int64))


@cache
def fashion_mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images float32 [n, 1, 28, 28] from 0 to 1, and labels int64 [n]."""
    return _idx("fashion_mnist", split)


@cache
def mnist(split: str) -> tuple[Tensor, Tensor]:
    """Images float32 [n, 1, 28, 28] from 0 to 1, and labels int64 [n]."""
    return _idx("mnist", split)


def _idx(folder: str, split: str) -> tuple[Tensor, Tensor]:
    name = "train" if split == "train" else "t10k"
    with gzip.open(path(f"{folder}/{name}-images-idx3-ubyte.gz")) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 1, 28, 28)
    with gzip.open(path(f"{folder}/{name}-labels-idx1-ubyte.gz")) as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.from_numpy(images.copy()).float() / 255, torch.from_numpy(labels.astype(np.int64))


@cache
def ag_news(split: str) -> tuple[list[str], Tensor]:
    """Titles with descriptions, and their classes from 0 to 3, int64."""
    name = "test.csv.gz" if split == "test" else "train_20k.csv.gz"
    with gzip.open(path(f"ag_news/{name}"), "rt", encoding="utf8", newline="") as file:
        rows = list(csv.reader(file))
    return [f"{row[1]} {row[2]}" for row in rows], torch.tensor([int(row[0]) - 1 for row in rows])


def words(text: str) -> list[str]:
    """A text's words and signs in lower case."""
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower())


def vocabulary(texts: Sequence[str], size: int) -> dict[str, int]:
    """The commonest words, numbered after the four special tokens."""
    counted = Counter(word for text in texts for word in words(text))
    return {word: number for number, (word, _) in enumerate(counted.most_common(size - 4), start=4)}


def tokens(texts: Sequence[str], known: dict[str, int], length: int) -> tuple[Tensor, Tensor]:
    """Token numbers int64 [n, longest, at most ``length``], padded with zeros, and the mask of what is no padding."""
    numbers = ([known.get(word, UNKNOWN) for word in words(text)[: length - 2]] for text in texts)
    rows = [[START, *each, SEPARATOR] for each in numbers]
    padded = torch.full((len(rows), max(map(len, rows))), PADDING)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row)
    return padded, (padded != PADDING).long()
