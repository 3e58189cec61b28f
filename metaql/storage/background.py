"""One thread that does jobs in order, behind a queue that is bounded by the bytes the jobs hold.

Ctrl-C may come at any moment, and `with condition:` of `threading` can then leave its lock taken: the thread would wait
for it for ever, and the program for the thread. So nobody waits for a lock here. What there is to know is in values
that one side alone changes, each in a single operation; a bell tells the other side to look again, and whoever begins
to wait rings first, so that a ring which an interrupt has swallowed is missed by nobody.
"""

from __future__ import annotations

import _thread
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

Job = Callable[[], None]
Bell = SimpleQueue[None]


class Background:
    """Starts at the first job. After a job's error later jobs are discarded, and every call raises the error.

    The calls come from one thread.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        # The first one is being done.
        self._jobs: deque[tuple[Job, int]] = deque()
        self._submitted_bytes = 0
        self._done_bytes = 0
        self._stopping = False
        self._error: BaseException | None = None
        self._started = False
        self._ended = False
        self._runs = _thread.allocate_lock()
        self._for_thread: Bell = SimpleQueue()
        self._for_caller: Bell = SimpleQueue()

    def submit(self, job: Job, size: int) -> None:
        """Queues a job that holds ``size`` bytes; waits while others hold too many."""
        self._wait(lambda: self._error is not None or self._has_room(size))
        self.check()
        self._start()
        self._submitted_bytes += size
        self._jobs.append((job, size))
        _ring(self._for_thread)

    def check(self) -> None:
        """Raises what a job has raised, if one has."""
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Waits until every job is done."""
        self._wait(lambda: self._error is not None or not self._jobs)
        self.check()

    def stop(self) -> None:
        """Discards what has not begun and waits for what has."""
        self._stopping = True
        _ring(self._for_thread)
        if self._started:
            self._wait(lambda: self._ended)

    def _wait(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            _ring(self._for_thread)
            self._for_caller.get()

    def _has_room(self, size: int) -> bool:
        return not self._jobs or self._submitted_bytes - self._done_bytes + size <= self._limit

    def _start(self) -> None:
        if not self._started:
            # As a daemon, so that a program that forgets to close its recorder still ends. Not threading.Thread, whose
            # start and join take locks of the kind above.
            _thread.start_new_thread(self._run, ())
            # Only now: a thread that is not yet marked has no jobs, so nobody need wait for it.
            self._started = True

    def _run(self) -> None:
        # An interrupt just before the mark above lets a second thread start.
        if not self._runs.acquire(blocking=False):
            return
        while self._error is None and not self._stopping:
            if self._jobs:
                self._do_first()
            else:
                self._for_thread.get()
        self._jobs.clear()
        self._ended = True
        _ring(self._for_caller)

    def _do_first(self) -> None:
        job, size = self._jobs[0]
        try:
            job()
        except BaseException as error:  # handed to the caller's thread, whatever it is
            self._error = error
        del job
        self._done_bytes += size
        self._jobs.popleft()
        _ring(self._for_caller)


def _ring(bell: Bell) -> None:
    if bell.empty():
        bell.put(None)
