"""``metaql_members(gradients) -> BIGINT``: a number that stands for a list of gradients.

For compiled SQL. A function that scores each row with every member gets this number: the list itself, handed over
beside each of 2,048 rows, would be copied as often.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from metaql.errors import ReferenceError
from metaql.storage.arrow_arrays import column
from metaql.udfs import references
from metaql.udfs.function import Function
from metaql.udfs.references import GRADIENT, Bools, References

if TYPE_CHECKING:
    from metaql.udfs.session import Session

MEMBERS = "metaql_members"


@dataclass(frozen=True)
class Members:
    """A list's gradients, and where in it they are: None stands for everywhere, else the others are NULL."""

    gradients: References
    mask: Bools | None

    def __len__(self) -> int:
        return len(self.gradients) if self.mask is None else len(self.mask)


class MemberLists:
    """The lists by number. They are kept as long as the connection, like the definitions of vectors."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lists: list[Members] = []
        self._numbers: dict[bytes, int] = {}

    def add(self, members: Members) -> int:
        """The number of this list; of an equal one that is already there the same."""
        key = _key(members)
        with self._lock:
            number = self._numbers.setdefault(key, len(self._lists))
            if number == len(self._lists):
                self._lists.append(members)
            return number

    def get(self, number: int) -> Members:
        """The list of this number."""
        if not 0 <= number < len(self._lists):
            raise ReferenceError(f"there is no list of gradients {number} on this connection")
        return self._lists[number]


def members(session: Session) -> Function:
    """NULL where the list is NULL."""

    def evaluate(lists: Any) -> pa.Array:
        lists = references.array(lists)
        return column([_added(session, lists, place) for place in range(len(lists))], pa.int64())

    return Function(MEMBERS, (f"{GRADIENT}[]",), "BIGINT", evaluate)


def _added(session: Session, lists: pa.ListArray, place: int) -> int | None:
    if not lists[place].is_valid:
        return None
    begin, end = lists.offsets[place].as_py(), lists.offsets[place + 1].as_py()
    children, mask = references.parts(lists.values.slice(begin, end - begin))
    return session.members.add(Members(references.read(children, mask), mask))


def _key(members: Members) -> bytes:
    gradients, digest = members.gradients, hashlib.blake2b(digest_size=16)
    digest.update(f"{gradients.patterns}\n{len(members)}\n".encode())
    for values in (gradients.store, gradients.row, gradients.code, members.mask):
        digest.update(b"-" if values is None else np.ascontiguousarray(values).tobytes())
    return digest.digest()
