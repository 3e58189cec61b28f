"""Time of calls, measured in rounds in which every way has its turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Seconds:
    """Wall time of a call, and CPU time of all its threads."""

    wall: float
    cpu: float


def seconds(call: Callable[[], object]) -> Seconds:
    """Of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Seconds(time.perf_counter() - wall, time.process_time() - cpu)


def interleaved(ways: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, list[Seconds]]:
    """name => the times of each round; the ways take turns, in an order that moves on from round to round."""
    times: dict[str, list[Seconds]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-warm_up, rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            measured = seconds(ways[name])
            if number >= 0:
                times[name].append(measured)
    return times


def median_ratio(times: list[Seconds], others: list[Seconds], of: str = "wall") -> float:
    """The median over the rounds of how many times the others' time it took; ``of`` is "wall" or "cpu"."""
    return statistics.median(getattr(one, of) / getattr(other, of) for one, other in zip(times, others, strict=True))


def median(times: list[Seconds], of: str = "wall") -> float:
    """The median time, in seconds."""
    return statistics.median(getattr(one, of) for one in times)
