"""A seekable file over ranged reads: for libraries that want a file where there is an object."""

from __future__ import annotations

import io
from collections.abc import Callable

from pipelines import store

__all__ = ["RangedFile", "open_object"]


class RangedFile(io.RawIOBase):
    """Read-only. `read(start, length)` gives bytes of the object, whose size is known."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._position = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence] + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        data = self._read(self._position, length)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_object(uri: str) -> RangedFile:
    """An object of the store. Raises store.NotFound."""
    info = store.stat(uri)
    return RangedFile(info.size, lambda start, length: store.read(uri, start, length))
