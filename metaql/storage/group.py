"""The processes of a distributed training that fill one store together, and how they speak to each other.

Each exchange begins with a line of five numbers from every rank, which says among others whether it has failed. So a
rank that fails joins the others' next exchange, whichever it is, and all of them stop at the same place.
"""

from __future__ import annotations

import signal
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from metaql.errors import MetaQLError, RecordingError

T = TypeVar("T")
Numbers = tuple[int, int, int]
_NOTHING: Numbers = (0, 0, 0)


@dataclass
class Turn:
    """Three numbers that this rank says at the end of a ``together``, and then those that every rank said, in order."""

    own: Numbers = _NOTHING
    all: list[Numbers] = field(default_factory=list)


class Group:
    """A process alone, or the ranks of ``processes``, of which rank 0 leads. Every one of these has to make it."""

    def __init__(self, processes: dist.ProcessGroup | None = None) -> None:
        self.rank = 0 if processes is None else dist.get_rank(processes)
        self.size = 1 if processes is None else dist.get_world_size(processes)
        # Of its own, so that nothing said here is taken for a gradient; over gloo, so that no device is needed.
        self._processes = None if processes is None or self.size == 1 else _copy(processes)
        self._method: str | None = None
        self._told: BaseException | None = None

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, or alone."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This rank's part of so many samples: the ranks' parts follow one another."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    @contextmanager
    def together(self, method: str) -> Iterator[Turn]:
        """What all ranks do inside, or none of them: an error of one is raised on each, at its next exchange.

        ``method`` is what the user called. At the end the ranks wait for each other.
        """
        outer = self._method
        self._method = outer or method
        try:
            turn = Turn()
            try:
                yield turn
            except BaseException as error:
                if error is not self._told:
                    self._tell(error)
                raise
            turn.all = self._exchange(turn.own)
        finally:
            self._method = outer

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order of rank; inside ``together``."""
        if self.size == 1:
            return [value]
        with _uninterrupted():
            self._line(_NOTHING)
            return self._objects(value)

    def lead(self, work: Callable[[], T]) -> T:
        """What ``work`` gives on rank 0, which alone does it; inside ``together``."""
        return cast(T, self.gather(work() if self.leads else None)[0])

    def knows(self, error: BaseException | None) -> bool:
        """Whether every rank raises an error now, of which this is the one here; alone, always."""
        return self.size == 1 or (error is not None and error is self._told)

    def close(self) -> None:
        """Ends the talk, after the last words."""
        if self._processes is not None:
            processes, self._processes = self._processes, None
            _closed.append(processes)

    def leave(self) -> None:
        """Ends the talk at once: those who wait for this rank get an error."""
        if self._processes is not None:
            processes, self._processes = self._processes, None
            _destroy(processes)

    def _exchange(self, numbers: Numbers) -> list[Numbers]:
        if self.size == 1:
            return [numbers]
        with _uninterrupted():
            return self._line(numbers)

    def _tell(self, error: BaseException) -> None:
        """Joins the others' next exchange to say that this rank has failed; nothing more if they are gone."""
        if self._processes is None:
            return
        with _uninterrupted(), suppress(MetaQLError):
            self._line(_NOTHING, error)
        if self._processes is not None:
            self._told = error

    def _line(self, numbers: Numbers, error: BaseException | None = None) -> list[Numbers]:
        assert self._method is not None
        own = [error is not None, zlib.crc32(self._method.encode()), *numbers]
        lines = torch.empty(self.size, len(own), dtype=torch.int64)
        self._call(dist.all_gather, list(lines), torch.tensor(own, dtype=torch.int64))
        if bool(lines[:, 0].any()):
            self._raise_failure(error)
        if len(lines[:, 1].unique()) > 1:
            self._raise_disorder(self._method)
        return [(first, second, third) for first, second, third in lines[:, 2:].tolist()]

    def _raise_failure(self, error: BaseException | None) -> None:
        reports = self._objects(None if error is None else _report(error))
        rank, (kind, message) = next((rank, report) for rank, report in enumerate(reports) if report is not None)
        self._told = kind(f"Rank {rank} could not go on, so that nothing of this is kept on any rank. {message}")
        raise self._told

    def _raise_disorder(self, method: str) -> None:
        called = ", ".join(f"rank {rank} {name}" for rank, name in enumerate(self._objects(method)))
        self._told = RecordingError(
            "Every rank has to call the same methods of its recorder in the same order, rank 0's not alone. "
            f"Now there called {called}."
        )
        raise self._told

    def _objects(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        self._call(dist.all_gather_object, found, value)
        return found

    def _call(self, collective: Callable[..., Any], *arguments: Any) -> None:
        if self._processes is None:
            raise RecordingError("The ranks of this recorder no longer talk to each other. Start the training anew.")
        try:
            collective(*arguments, group=self._processes)
        except RuntimeError as error:
            self.leave()
            raise RecordingError(
                "Another rank has ended, or does not answer any more; its own error, if it has one, says why. What "
                f"was not committed before is not in the store. ({error})"
            ) from error


ALONE = Group()
# What was closed may hold words that another rank has yet to read, until all ranks have come together again.
_closed: list[dist.ProcessGroup] = []


def _copy(processes: dist.ProcessGroup) -> dist.ProcessGroup:
    """The same ranks once more, over gloo, as patient as they are."""
    devices = {torch.device(each) for each in processes._device_types}
    options = [getattr(processes._get_backend(device), "options", None) for device in devices]
    ranks = dist.get_process_group_ranks(processes)
    everyone = len(ranks) == dist.get_world_size()
    timeout = max((each._timeout for each in options if each is not None), default=None)
    made = dist.new_group(ranks, timeout=timeout, backend="gloo", use_local_synchronization=not everyone)
    assert isinstance(made, dist.ProcessGroup)
    # A group of some ranks alone would get the name of one that was destroyed, and the addresses noted under it.
    while _closed and everyone:
        _destroy(_closed.pop())
    return made


def _destroy(processes: dist.ProcessGroup) -> None:
    # The user may have taken down all groups before.
    with suppress(ValueError, AssertionError, RuntimeError):
        dist.destroy_process_group(processes)


def _report(error: BaseException) -> tuple[type[MetaQLError], str]:
    """Which error the other ranks raise: an error of ours keeps its class; another may not even exist there."""
    if isinstance(error, MetaQLError):
        return type(error), str(error)
    return RecordingError, f"{type(error).__name__}: {error}".removesuffix(": ")


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end: an exchange that is left in its middle would be mistaken for the next."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: came.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(*came[0])
