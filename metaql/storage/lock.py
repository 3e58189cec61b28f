"""The lock of a store's one writer: held by the operating system, so that it ends with its process."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from metaql.errors import StoreLockedError
from metaql.storage.durable import writing

LOCK = "writer.lock"


class WriterLock:
    """Held from construction until ``release`` or until the object is gone."""

    def __init__(self, folder: Path) -> None:
        path = folder / LOCK
        with writing(path):
            self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        self._close = weakref.finalize(self, os.close, self.descriptor)
        try:
            with writing(path):
                _take(self.descriptor, folder)
                _sign(self.descriptor)
        except BaseException:
            self._close()
            raise
        _held.add(self)

    @property
    def held(self) -> bool:
        """Whether it has not been released."""
        return self._close.alive

    def release(self) -> None:
        """Lets others write; harmless when done before."""
        if self.held:
            os.ftruncate(self.descriptor, 0)
            fcntl.flock(self.descriptor, fcntl.LOCK_UN)
            self._close()

    def forget(self) -> None:
        """Closes this process's copy of the lock and leaves its owner's alone."""
        self._close()


def _take(descriptor: int, folder: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise StoreLockedError(_held_by(descriptor, folder)) from None


def _sign(descriptor: int) -> None:
    """Notes who holds the lock, for others' messages: a full disk must not keep a vacuum from making room."""
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)


def _held_by(descriptor: int, folder: Path) -> str:
    try:
        owner: dict[str, Any] = json.loads(os.pread(descriptor, 4096, 0))
        pid, host, since = owner["pid"], owner["host"], owner["since"]
    except (ValueError, KeyError, TypeError):
        return f"Another process is about to write to {folder}: a store has one writer at a time. Try again later."
    if pid == os.getpid() and host == socket.gethostname():
        return (
            f"This process (pid {pid}) is itself writing to {folder} since {since}: a store has one writer at a "
            "time. Close the other recorder first (recorder.close())."
        )
    return (
        f"Process {pid} on {host} is writing to {folder} since {since}: a store has one writer at a time. "
        "Wait until it is done, or stop it, or record to another folder. Reading is possible meanwhile."
    )


_held: weakref.WeakSet[WriterLock] = weakref.WeakSet()


def _forget_in_child() -> None:
    """A forked child (a data loader's worker) must not keep the lock alive when its parent dies."""
    for lock in list(_held):
        lock.forget()
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
