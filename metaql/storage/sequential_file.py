"""A new file that is written from front to end, past the page cache where the system allows it.

What is recorded is not read again soon. Written through the cache it would push out what is, take a copy by the
kernel of everything, and pile up until a commit has to wait for the disk. Written directly, it costs the processor
next to nothing and is on the disk when the call returns.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np

# A multiple of every block size; direct writes go from aligned memory, in whole pieces.
_PIECE_BYTES = 1 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)


class SequentialFile:
    """``path`` must not exist yet. OSErrors come out as they are; the file is closed when nobody holds it."""

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor = os.open(path, flags, 0o644)
        # Closes it too when an interrupt kept its owner from being made.
        self.release = weakref.finalize(self, os.close, self._descriptor)
        self._piece: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._filled = 0
        self.offset = 0

    def write(self, view: memoryview) -> None:
        """Appends the bytes, of which the last ones may wait for ``finish``."""
        data = np.frombuffer(view, dtype=np.uint8)
        self.offset += len(data)
        while len(data):
            if self._piece is None:
                self._piece = np.frombuffer(mmap.mmap(-1, _PIECE_BYTES), dtype=np.uint8)
                _set_direct(self._descriptor, _DIRECT)
            taken = min(len(data), _PIECE_BYTES - self._filled)
            self._piece[self._filled : self._filled + taken] = data[:taken]
            self._filled += taken
            data = data[taken:]
            if self._filled == _PIECE_BYTES:
                self._write(self._piece)
                self._filled = 0

    def finish(self) -> None:
        """Brings everything to the disk and closes the file."""
        if self._piece is not None and self._filled:
            _set_direct(self._descriptor, 0)
            self._write(self._piece[: self._filled])
        os.fsync(self._descriptor)
        self.release()

    def _write(self, piece: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
        view, written = piece.data, 0
        while written < len(view):
            try:
                written += os.write(self._descriptor, view[written:])
            except OSError as error:
                # Some file systems take the flag and refuse the write.
                if error.errno != errno.EINVAL or not _set_direct(self._descriptor, 0):
                    raise


def _set_direct(descriptor: int, flag: int) -> bool:
    """Sets or clears direct writing; whether anything changed."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = (flags & ~_DIRECT) | flag
    if wanted == flags:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
    except OSError:
        # A file system without direct writing: the page cache it is.
        return False
    return True
