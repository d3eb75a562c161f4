"""Objects in S3 and files in local folders behind one set of functions.

A URI is `s3://bucket/key` or a local path. Where things are (endpoint, credentials) comes from the environment alone.
Writes are atomic: a reader sees the old object or the new one. Conditional writes (`if_absent`, `if_match`) are the one
lock of the project; the loser gets `Conflict`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.store import local, s3
from pipelines.store.errors import Conflict, NotFound, ObjectInfo, StoreError, Unreadable
from pipelines.store.place import is_s3, join, lack_of_space, root
from pipelines.store.s3 import STALL_SECONDS, client

__all__ = [
    "Conflict",
    "NotFound",
    "ObjectInfo",
    "StoreError",
    "Unreadable",
    "client",
    "delete",
    "download",
    "exists",
    "is_s3",
    "join",
    "lack_of_space",
    "list_objects",
    "read",
    "read_into",
    "read_json",
    "remove_leftovers",
    "root",
    "stat",
    "upload",
    "write",
    "write_json",
]


def read(uri: str, start: int | None = None, length: int | None = None, *, if_match: str | None = None) -> bytes:
    """The object's bytes, or `length` bytes from `start`.

    A connection that breaks in mid-body is resumed from the last byte, never from the start, and only while the object
    is still the same one. Raises NotFound, Conflict (the object changed), StoreError.
    """
    if length == 0:
        return b""
    if not is_s3(uri):
        return local.read(uri, start, length, if_match)
    return s3.read(uri, start, length, if_match)


def read_into(
    uri: str,
    buffer: memoryview,
    start: int = 0,
    *,
    if_match: str | None = None,
    stall_seconds: float = STALL_SECONDS,
) -> ObjectInfo:
    """Fill `buffer` with the object's bytes from `start`; says how large the whole object is, and its ETag.

    One request, no HEAD before it. What breaks (reset, truncation, a stall of `stall_seconds`, 503) is tried again from
    the last byte, while the object is still the same one. Raises NotFound, Conflict (the object changed), StoreError.
    """
    if not len(buffer):
        return stat(uri)
    if not is_s3(uri):
        return local.read_into(uri, buffer, start, if_match)
    return s3.read_into(uri, buffer, start, if_match, stall_seconds)


def stat(uri: str) -> ObjectInfo:
    """Size and ETag. Raises NotFound."""
    return s3.stat(uri) if is_s3(uri) else local.stat(uri)


def exists(uri: str) -> bool:
    try:
        stat(uri)
    except NotFound:
        return False
    return True


def list_objects(prefix: str) -> Iterator[ObjectInfo]:
    """Everything below `prefix` (a folder), sorted by URI. Empty if there is nothing; NotFound for a missing bucket."""
    return s3.list_objects(prefix) if is_s3(prefix) else local.list_files(prefix)


def download(uri: str, path: Path) -> Path:
    """Copy an object to a local file; the file appears only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with local.replacing(path) as temporary:
        if is_s3(uri):
            s3.download(uri, temporary)
        else:
            temporary.write_bytes(read(uri))
    return path


def write(
    uri: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None, sha256: str | None = None
) -> str:
    """Write the whole object; returns its ETag. `if_absent` and `if_match` raise Conflict when the condition fails.

    A `sha256` (hex) that the caller knows already is the checksum that the store compares.
    """
    if not is_s3(uri):
        return local.write(Path(uri), data, if_absent=if_absent, if_match=if_match)
    return s3.write(uri, data, if_absent, if_match, sha256)


def upload(path: Path, uri: str) -> str:
    """Copy a local file to the store; it appears only when whole. Returns its ETag."""
    return s3.upload(path, uri) if is_s3(uri) else local.copy(path, Path(uri))


def delete(uri: str) -> None:
    """Remove one object; nothing happens if it is not there."""
    if is_s3(uri):
        s3.delete(uri)
    else:
        Path(uri).unlink(missing_ok=True)


def remove_leftovers(prefix: str) -> int:
    """Half-written files of killed writers of this host, below a local folder. A bucket never shows any."""
    return 0 if is_s3(prefix) else local.remove_leftovers(prefix)


def read_json(uri: str) -> Any:
    data = read(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StoreError(f"{uri} is not JSON ({error}); delete it and run the same command again") from None


def write_json(uri: str, value: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
    data = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    return write(uri, data, if_absent=if_absent, if_match=if_match)
