"""MetaQL: SQL over the gradients of a training run.

``Recorder`` records one, ``connect`` asks it, ``load`` puts it into a DuckDB connection that is there already.
Importing this loads none of them.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from metaql.connection import Connection, connect, load
    from metaql.errors import MetaQLError
    from metaql.storage.recording.recorder import Recorder

    __version__: str

__all__ = ["Connection", "MetaQLError", "Recorder", "__version__", "connect", "load"]

_HOMES = {
    "Connection": "metaql.connection",
    "MetaQLError": "metaql.errors",
    "Recorder": "metaql.storage.recording.recorder",
    "connect": "metaql.connection",
    "load": "metaql.connection",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        return version("metaql")
    if name not in _HOMES:
        raise AttributeError(f"module 'metaql' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
