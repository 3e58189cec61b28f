"""What long computations say to the thread that waits for them, how far they are, and hear from it: to stop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Work:
    """A session's computations, in whatever threads. Those that take long call ``go_on`` several times a second."""

    def __init__(self) -> None:
        self._stops = 0
        self._gatherings: list[Gathering] = []
        self._trainings: list[Training] = []

    def go_on(self) -> None:
        """InterruptedError when nothing shall go on."""
        if self._stops:
            raise InterruptedError("stopped by Ctrl-C")

    @contextmanager
    def gathering(self, total: float, done: float) -> Iterator[Gathering]:
        """While so many bytes are gathered for a sum, some of which were gathered before."""
        gathering = Gathering(self, total, done)
        self._gatherings.append(gathering)
        try:
            yield gathering
        finally:
            self._gatherings.remove(gathering)

    @property
    def gathered(self) -> float | None:
        """How much of a sum is gathered, from 0 to 1; None while there is nothing to gather."""
        for gathering in self._gatherings[:1]:
            return min(gathering.done / max(gathering.total, 1), 1.0)
        return None

    @contextmanager
    def training(self) -> Iterator[Training]:
        """While a model is trained."""
        training = Training(self)
        self._trainings.append(training)
        try:
            yield training
        finally:
            self._trainings.remove(training)

    @property
    def trained(self) -> tuple[float, str] | None:
        """How much of a training is done, from 0 to 1, and what it has come to; None while there is none."""
        for training in self._trainings[:1]:
            return training.done, training.told
        return None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """While no computation shall go on. It stops those of other threads' queries too: Ctrl-C means all."""
        # Only the main thread does this.
        self._stops += 1
        try:
            yield
        finally:
            self._stops -= 1


class Gathering:
    """How much of a sum has been gathered, in bytes."""

    def __init__(self, work: Work, total: float, done: float) -> None:
        self._work, self.total, self.done = work, total, done

    def add(self, size: float) -> None:
        """Says that so much more is there; InterruptedError when nothing shall go on."""
        self._work.go_on()
        self.done += size


class Training:
    """How far a training is."""

    def __init__(self, work: Work) -> None:
        self._work, self.done, self.told = work, 0.0, ""

    def reached(self, done: float, validation_loss: float | None) -> None:
        """Says how much is done, from 0 to 1; InterruptedError when nothing shall go on."""
        self._work.go_on()
        self.done = done
        self.told = "" if validation_loss is None else f"validation loss {validation_loss:.4g}"
