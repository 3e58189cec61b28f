"""torch's random numbers from a seed, for one training at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_LOCK = threading.RLock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from the seed; afterwards torch's own go on where they were.

    Other threads that ask for them wait, since all threads draw from one generator.
    """
    with _LOCK, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
