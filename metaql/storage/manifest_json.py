"""A manifest as two lines of JSON: the format with a checksum of the second line, then the manifest itself."""

from __future__ import annotations

import json
import zlib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from metaql.errors import CorruptStoreError, StoreVersionError
from metaql.storage.manifest import (
    Checkpoint,
    Collection,
    Curvature,
    DataFile,
    Embeddings,
    Inputs,
    Manifest,
    Range,
    Segment,
    Statistics,
)
from metaql.storage.schema import Layer, Parameter, Unfold

FORMAT = "metaql"
FORMAT_VERSION = 3
# Version 1 knew no tied layers, and before version 3 every segment had its own suffixes; all else is the same.
_READABLE = (1, 2, FORMAT_VERSION)


def encode(manifest: Manifest) -> bytes:
    """The bytes of the manifest's file. ValueError or TypeError for settings that JSON doesn't know."""
    body = json.dumps(manifest, default=_plain, separators=(",", ":"), allow_nan=False).encode()
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "bytes": len(body), "crc32": zlib.crc32(body)}
    return json.dumps(header).encode() + b"\n" + body + b"\n"


def decode(data: bytes, path: Path, cure: str) -> Manifest:
    """The manifest in these bytes of ``path``; errors name the path and, where it is damaged, the cure."""
    line, _, rest = data.partition(b"\n")
    try:
        header = json.loads(line)
        name, version, length, crc = (header[key] for key in ("format", "format_version", "bytes", "crc32"))
    except (ValueError, KeyError, TypeError):
        raise CorruptStoreError(f"{path} is not a manifest any more: {cure}.") from None
    if name == FORMAT and version not in _READABLE:
        raise StoreVersionError(
            f"{path} is in version {version} of the store's format, and this MetaQL reads versions "
            f"{', '.join(map(str, _READABLE))}: use the MetaQL that recorded it, or a newer one."
        )
    body = rest[:-1]
    if name != FORMAT or rest[-1:] != b"\n" or len(body) != length or zlib.crc32(body) != crc:
        raise CorruptStoreError(f"{path} is cut off or changed: {cure}.")
    try:
        return _manifest(json.loads(body))
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(f"{path} lacks what a manifest has ({error!r}): {cure}.") from error


def _plain(record: Any) -> Any:
    """Ranges, of which there are many, as bare lists; every other record as an object."""
    if isinstance(record, Range):
        return [record.offset, record.length, record.crc, record.rows]
    if is_dataclass(record):
        return vars(record)
    raise TypeError(f"{record!r} is of type {type(record).__name__}")


def _manifest(body: dict[str, Any]) -> Manifest:
    lists = {
        "layers": tuple(_layer(one) for one in body["layers"]),
        "checkpoints": tuple(Checkpoint(**one) for one in body["checkpoints"]),
        "collections": tuple(_collection(one) for one in body["collections"]),
        # Manifests from before there were any lack these.
        "curvatures": tuple(Curvature(**one) for one in body.get("curvatures", ())),
    }
    return Manifest(**{**body, **lists})


def _layer(body: dict[str, Any]) -> Layer:
    parameters = tuple(Parameter(one["name"], tuple(one["shape"])) for one in body["parameters"])
    return Layer(**{**body, "parameters": parameters, "unfold": _optional(_unfold, body["unfold"])})


def _unfold(body: dict[str, Any]) -> Unfold:
    padding = tuple((before, after) for before, after in body["padding"])
    tuples = {key: tuple(value) for key, value in body.items()}
    return Unfold(**{**tuples, "padding": padding})


def _collection(body: dict[str, Any]) -> Collection:
    parts = {
        "row_file": _file(body["row_file"]),
        "metadata": _optional(_file, body["metadata"]),
        "steps": _optional(_file, body["steps"]),
        "inputs": _optional(_inputs, body["inputs"]),
        "segments": tuple(_segment(one) for one in body["segments"]),
        # Manifests from before there were any lack these two.
        "logits": _optional(_file, body.get("logits")),
        "embeddings": tuple(Embeddings(one["layer"], _file(one["file"])) for one in body.get("embeddings", ())),
    }
    return Collection(**{**body, **parts})


def _segment(body: dict[str, Any]) -> Segment:
    return Segment(**{**body, "file": _file(body["file"]), "statistics": Statistics(**body["statistics"])})


def _inputs(body: dict[str, Any]) -> Inputs:
    return Inputs(_optional(_file, body["file"]), tuple(body["shape"]), body["dtype"])


def _file(body: dict[str, Any]) -> DataFile:
    return DataFile(body["path"], body["bytes"], tuple(Range(*one) for one in body["ranges"]))


def _optional(decode: Any, body: Any) -> Any:
    return None if body is None else decode(body)
