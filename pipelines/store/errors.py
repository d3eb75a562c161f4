"""What may go wrong, and what is known of an object."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Conflict", "NotFound", "ObjectInfo", "StoreError", "Unreadable", "ends_early"]


class StoreError(RuntimeError):
    """The store did not do what was asked; the message names the URI and the remedy."""


class NotFound(StoreError):
    """No such object, file or bucket."""


class Unreadable(StoreError):
    """A local file that is there and cannot be read: its permissions, or a fault of the disk."""


class Conflict(StoreError):
    """A conditional write lost: somebody else wrote first."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    uri: str
    size: int  # Bytes.
    etag: str  # Changes whenever the content does; comparable within one store only.


def ends_early(uri: str, start: int, length: int, size: int) -> str:
    return f"{uri}: {length:,} bytes from byte {start:,} wanted, the object ends after {size:,}"
