"""Scores that were computed, kept for the calls and the queries that ask for them next.

Those of whole blocks of rows against one vector, and those of some rows with each of some others.
"""

from __future__ import annotations

from metaql.storage.cache import Cache
from metaql.udfs.costs import Prices
from metaql.udfs.references import Floats

# Eight million scores, of either kind: those of many pairs, of which nobody may ask again, don't displace the others.
CACHE_BYTES = 64 << 20
# Blocks of which it is remembered what scoring some of their rows has cost.
REMEMBERED = 1 << 16

# What scores depend on, and which block of rows they are of.
Key = tuple[object, ...]


class KeptScores:
    """Scores by block, and of pairs; and for blocks without, the seconds that single rows of them have cost."""

    def __init__(self, cache_bytes: int = CACHE_BYTES) -> None:
        self._scores: Cache[Key, Floats] = Cache(cache_bytes)
        self._pairs: Cache[Key, Floats] = Cache(cache_bytes)
        self._spent: Cache[Key, float] = Cache(REMEMBERED)
        # What each way costs, for what scores depend on.
        self.prices: Cache[Key, Prices] = Cache(REMEMBERED)

    def get(self, key: Key) -> Floats | None:
        """A block's scores."""
        return self._scores.get(key)

    def put(self, key: Key, scores: Floats) -> None:
        """Keeps a block's scores; nobody may write to them any more."""
        self._scores.put(key, scores, scores.nbytes)

    def pairs(self, key: Key) -> Floats | None:
        """The scores of some rows with each of some others: [l, r]."""
        return self._pairs.get(key)

    def put_pairs(self, key: Key, scores: Floats) -> None:
        """Keeps them; nobody may write to them any more."""
        self._pairs.put(key, scores, scores.nbytes)

    def spent(self, key: Key) -> float:
        """Seconds that rows of a block have cost one by one."""
        return self._spent.get(key) or 0.0

    def spend(self, key: Key, seconds: float) -> None:
        """Adds to them."""
        self._spent.put(key, self.spent(key) + seconds, 1)
