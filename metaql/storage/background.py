"""One thread that does jobs in order, behind a queue that is bounded by the bytes the jobs hold."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition, Thread

Job = Callable[[], None]


class Background:
    """Starts at the first job. After a job's error later jobs are discarded, and every call raises the error."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._jobs: deque[tuple[Job, int]] = deque()
        self._changed = Condition()
        self._pending_bytes = 0
        self._busy = False
        self._stopping = False
        self._error: BaseException | None = None
        self._thread: Thread | None = None

    def submit(self, job: Job, size: int) -> None:
        """Queues a job that holds ``size`` bytes; waits while others hold too many."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._has_room(size))
            self._raise()
            self._jobs.append((job, size))
            self._pending_bytes += size
            self._start()
            self._changed.notify_all()

    def check(self) -> None:
        """Raises what a job has raised, if one has."""
        with self._changed:
            self._raise()

    def drain(self) -> None:
        """Waits until every job is done."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._jobs or self._busy))
            self._raise()

    def stop(self) -> None:
        """Discards what has not begun and waits for what has."""
        with self._changed:
            self._stopping = True
            self._jobs.clear()
            self._changed.notify_all()
        # An interrupt may have come before the thread was alive; it then ends by itself.
        if self._thread is not None and self._thread.is_alive():
            self._thread.join()

    def _has_room(self, size: int) -> bool:
        return not self._pending_bytes or self._pending_bytes + size <= self._limit

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        if self._thread is None:
            # A daemon, so that a program that forgets to close its recorder still ends.
            self._thread = Thread(target=self._run, name="metaql-writer", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (item := self._next()) is not None:
            job, size = item
            try:
                job()
            except BaseException as error:  # handed to the caller's thread, whatever it is
                self._fail(error)
            del job, item
            self._done(size)

    def _next(self) -> tuple[Job, int] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._stopping)
            if not self._jobs:
                return None
            self._busy = True
            return self._jobs.popleft()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = error
            self._jobs.clear()

    def _done(self, size: int) -> None:
        with self._changed:
            self._busy = False
            self._pending_bytes = 0 if self._error else self._pending_bytes - size
            self._changed.notify_all()
