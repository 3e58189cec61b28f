"""Writing that survives a crash, and errors that say what became of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from metaql.errors import WriteError


def sync(path: Path) -> None:
    """Brings a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Puts ``data`` at ``path``: after a crash there is the old file or the new one, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusals into a WriteError that names the path."""
    try:
        yield
    except OSError as error:
        place = error.filename or path
        raise WriteError(
            f"Can't write {place}: {error.strerror or error}. Everything committed to the store is intact; "
            "what was being recorded is not in it. Make room (or mend the disk's permissions) and record it again."
        ) from error
