"""Models that this session has trained or read, so that a relation that is looked at twice trains once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaql.methods.elite import Fitted
from metaql.storage.cache import Cache

# Of results and networks: some hundred trainings of 100,000 rows.
CACHE_BYTES = 256 << 20
# A model that was read counts as one, whatever its size.
READ = 64

Key = tuple[object, ...]


class Fits:
    """Trained models by what they were trained on, and read ones by their folder."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._trained: Cache[Key, Fitted] = Cache(CACHE_BYTES)
        self._read: Cache[Path, tuple[Any, Any]] = Cache(READ)

    def trained(self, key: Key, train: Callable[[], Fitted]) -> Fitted:
        """The model of this key; trained when there is none, one at a time."""
        with self._lock:
            found = self._trained.get(key)
            if found is None:
                found = train()
                tensors = found.saved()[0].values()
                self._trained.put(key, found, sum(each.nbytes for each in tensors))
            return found

    def read(self, folder: Path, stamp: object, read: Callable[[], Any]) -> Any:
        """What was read from a folder, read again when the stamp is another."""
        found = self._read.get(folder)
        if found is None or found[0] != stamp:
            found = stamp, read()
            self._read.put(folder, found, 1)
        return found[1]
