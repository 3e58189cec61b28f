"""A cache bounded in size, which drops what was used least recently."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")


class Cache(Generic[Key, Value]):
    """Values by key, of at most ``capacity`` bytes (or whatever unit); safe to use from several threads at once."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used = 0
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    @property
    def used(self) -> int:
        """The size of all that is held now."""
        return self._used

    def get(self, key: Key) -> Value | None:
        """The value, which thereby becomes the most recently used; None when it is not there."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keeps a value of a size; one larger than the whole cache is not kept."""
        with self._lock:
            if key in self._entries:
                self._used -= self._entries.pop(key)[1]
            if size > self._capacity:
                return
            self._entries[key] = (value, size)
            self._used += size
            while self._used > self._capacity:
                self._used -= self._entries.popitem(last=False)[1][1]
