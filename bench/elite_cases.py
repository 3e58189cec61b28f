"""Polluted training data with a few labels, made of real sets. Needs nothing but torch, so that any environment can.

A case is drawn from a source: rows to train on and rows to test on, of which some are anomalies, of so many kinds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from bench import data

# The sets of more than 200 anomalies, so that half of some hundred training rows can be ones; but Ionosphere is small.
ADBENCH = ("10_cover", "23_mammography", "24_mnist", "2_annthyroid", "35_SpamBase", "4_breastw")
IMAGES = {"Fashion-MNIST": data.fashion_mnist, "MNIST": data.mnist}
EEG = "EEG Eye State"
# Of one class, and ten times as many of the nine others would be: an AUC needs no more.
TESTED = 1000
# The series' samples in a window, from one window to the next, and in a stretch that is not cut between train and test.
WINDOW, STRIDE, STRETCH = 32, 16, 128


@dataclass(frozen=True)
class Rows:
    """Features float32 [n, …]; ``kind`` int64 [n]: 0 is normal, others are kinds of anomalies."""

    features: Tensor
    kind: Tensor

    def __getitem__(self, places: Tensor) -> Rows:
        return Rows(self.features[places], self.kind[places])

    @property
    def is_anomaly(self) -> Tensor:
        return self.kind > 0


@dataclass(frozen=True)
class Source:
    """Rows to draw training rows and labels from, and all test rows."""

    name: str
    train: Rows
    test: Rows


@dataclass(frozen=True)
class Case:
    """What a detector is given: ``train`` features, ``labelled`` rows; and what is known of it: ``test`` rows.

    ``hidden`` bool [n] says which training rows are anomalies: no detector is told. The first labelled rows are there
    with fewer labels, too.
    """

    name: str
    pollution: float
    seed: int
    train: Tensor
    hidden: Tensor
    labelled: Rows
    test: Rows


@cache
def images(name: str, normal: int, side: int, seed: int) -> Source:
    """A class of Fashion-MNIST or MNIST as the normal one, [side, side]; the others are kinds 1 to 9."""
    parts = []
    for split in ("train", "test"):
        pixels, labels = IMAGES[name](split)
        kind = (labels - normal) % 10
        if split == "test":
            places = _some(kind, TESTED, 2 * TESTED, seed)
            pixels, kind = pixels[places], kind[places]
        parts.append(Rows(F.adaptive_avg_pool2d(pixels, side)[:, 0], kind))
    return Source(name, *parts)


@cache
def tabular(name: str, seed: int) -> Source:
    """A set of ADBench, three fifths of it to train on."""
    with np.load(data.path(f"adbench/{name}.npz")) as loaded:
        features = torch.from_numpy(loaded["X"].astype(np.float32))
        kind = torch.from_numpy(loaded["y"].astype(np.int64))
    order = torch.randperm(len(kind), generator=_generator(seed))
    train, test = order.tensor_split([len(order) * 3 // 5])
    rows = Rows(features, kind)
    held = rows[test]
    return Source(name.split("_", 1)[1], rows[train], held[_some(held.kind, TESTED, 2 * TESTED, seed)])


@cache
def eeg(seed: int) -> Source:
    """Windows [14, WINDOW] of the EEG set, closed eyes (for more than half of it) as anomalies.

    Stretches of a second are either to train or to test on, so that no window overlaps one of the other side.
    """
    with np.load(data.path("timeseries/eeg_eye_state.npz")) as loaded:
        series, closed = (torch.from_numpy(loaded[name].astype(np.float32)) for name in ("X", "y"))
    stretches = [
        Rows(
            series[at : at + STRETCH].unfold(0, WINDOW, STRIDE),
            (closed[at : at + STRETCH].unfold(0, WINDOW, STRIDE).mean(1) > 0.5).long(),
        )
        for at in range(0, len(series) - STRETCH + 1, STRETCH)
    ]
    order = torch.randperm(len(stretches), generator=_generator(seed)).tolist()
    cut = len(order) * 3 // 5
    parts = [
        Rows(
            torch.cat([stretches[each].features for each in places]),
            torch.cat([stretches[each].kind for each in places]),
        )
        for places in (order[:cut], order[cut:])
    ]
    return Source(EEG, *parts)


def drawn(
    source: Source, pollution: float, seed: int, samples: int, labels: int = 20, kinds: int | None = None
) -> Case:
    """As many training rows as ``samples`` or, whatever the pollution from 0.1 to 0.5, as there are.

    ``pollution`` of them are anomalies, of all kinds. Labels are for both classes alike, and not among the training
    rows; with ``kinds``, labelled anomalies are of so many kinds only, drawn at random.
    """
    generator = _generator(seed)
    order = torch.randperm(len(source.train.kind), generator=generator)
    kind = source.train.kind[order]
    normal, anomalous = order[kind == 0], order[kind > 0]
    shown = torch.ones_like(anomalous, dtype=torch.bool)
    if kinds is not None:
        there = source.train.kind.unique()[1:]
        chosen = there[torch.randperm(len(there), generator=generator)[:kinds]]
        shown = torch.isin(source.train.kind[anomalous], chosen)
    half = labels // 2
    known = anomalous[shown][:half]
    others = anomalous[~torch.isin(anomalous, known)]
    samples = min(samples, 2 * len(others), int((len(normal) - half) / 0.9))
    bad = round(pollution * samples)
    places = torch.cat([normal[half : half + samples - bad], others[:bad]])
    labelled = torch.stack([normal[:half], known], 1).flatten()
    return Case(
        source.name,
        pollution,
        seed,
        source.train.features[places],
        source.train.is_anomaly[places],
        source.train[labelled],
        source.test,
    )


def _some(kind: Tensor, normal: int, anomalous: int, seed: int) -> Tensor:
    order = torch.randperm(len(kind), generator=_generator(seed))
    found = kind[order]
    return torch.cat([order[found == 0][:normal], order[found > 0][:anomalous]])


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
