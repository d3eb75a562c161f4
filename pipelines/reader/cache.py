"""Pages kept on the disk of a node: bounded, shared by its processes, and never the reason why reading fails.

Every page is a file of its own, named by shard, version and place, with a checksum in front. A file appears only when
it is whole. The space used is counted under a lock; whoever would go over the bound throws out what was used least
recently, and counts anew from the files, so that a killed process leaves nothing behind for long.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["CacheError", "PageCache"]

log = logging.getLogger(__name__)

MAGIC = b"vitpage1"
HEADER = struct.Struct("<8sIQ")  # Magic, CRC-32 and length of what follows.
PART = ".part-"  # Names of files that are not whole yet.
LOCK = "lock"  # Holds the bytes in use, and is what processes lock.
STALE_SECONDS = 600.0  # An unfinished file of this age was left by a process that is gone.
KEPT_PART = 0.9  # Of the bound, after throwing out: so that it is not done for each page.


class CacheError(ValueError):
    """The cache cannot be set up as asked."""


class PageCache:
    """At most `max_bytes` of pages below `folder`. Any number of processes may share it."""

    def __init__(self, folder: str | Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = Path(folder), max_bytes
        self._is_broken = self._is_told = False
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CacheError(f"cache={folder}: {error.strerror or error}; give a folder that can be written") from None

    def get(self, uri: str, etag: str, offset: int, buffer: memoryview) -> bool:
        """Fill `buffer` with that stretch of the shard, if it is here and whole."""
        path = self._path(uri, etag, offset, len(buffer))
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                head = file.read(HEADER.size)
                magic, checksum, length = HEADER.unpack(head)
                done = os.preadv(file.fileno(), [buffer], HEADER.size)
        except FileNotFoundError:
            return False
        except (OSError, struct.error):
            magic, checksum, length, done = b"", 0, -1, 0
        if magic != MAGIC or length != len(buffer) or done != length or zlib.crc32(buffer) != checksum:
            log.warning("cache: %s is damaged and is read from the store again", path)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return False
        with contextlib.suppress(OSError):
            os.utime(path)
        return True

    def put(self, uri: str, etag: str, offset: int, data: memoryview) -> None:
        """Keep that stretch of the shard, if there is room for it. What fails is told once, and costs only speed."""
        size = HEADER.size + len(data)
        if self._is_broken or size > self._max_bytes * KEPT_PART:
            return
        path = self._path(uri, etag, offset, len(data))
        part = path.with_name(f"{path.name}{PART}{os.getpid()}-{threading.get_ident()}")
        try:
            path.parent.mkdir(exist_ok=True)
            self._reserve(part, size)
            with open(part, "r+b", buffering=0) as file:  # noqa: PTH123
                file.write(HEADER.pack(MAGIC, zlib.crc32(data), len(data)))
                written = file.write(data)
            if written == len(data):
                part.replace(path)
        except OSError as error:
            self._is_broken = error.errno != errno.ENOSPC  # A full disk may have room again.
            log.log(logging.DEBUG if self._is_told else logging.WARNING, "cache: %s cannot be kept: %s", path, error)
            self._is_told = True
        finally:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)

    def _path(self, uri: str, etag: str, offset: int, length: int) -> Path:
        name = hashlib.sha256(f"{uri}\n{etag}\n{offset}\n{length}".encode()).hexdigest()
        return self._folder / name[:2] / name[2:42]

    # Space ----------------------------------------------------------------------------------------------------------

    def _reserve(self, part: Path, size: int) -> None:
        """Make room, and an empty file of that size: whoever counts the files counts it, too."""
        with self._locked() as lock:
            text = os.pread(lock, 32, 0)
            used = int(text) if text.isdigit() else self._throw_out(self._max_bytes)
            if used + size > self._max_bytes:
                used = self._throw_out(int(self._max_bytes * KEPT_PART) - size)
            os.ftruncate(lock, 0)
            os.pwrite(lock, b"%d" % (used + size), 0)
            with open(part, "wb") as file:  # noqa: PTH123
                file.truncate(size)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        descriptor = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield descriptor
        finally:
            os.close(descriptor)  # Which unlocks; a killed process unlocks, too.

    def _throw_out(self, most: int) -> int:
        """Delete what was used least recently until `most` bytes are left; returns what is left."""
        found: list[tuple[float, int, str]] = []
        now = time.time()
        for folder in os.scandir(self._folder):
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    is_left_over = PART in entry.name and now - status.st_mtime > STALE_SECONDS
                    found.append((0.0 if is_left_over else status.st_mtime, status.st_size, entry.path))
        used = sum(size for _, size, _ in found)
        for modified, size, path in sorted(found):
            if used <= most and modified:
                break
            if PART in path and modified:
                continue  # Somebody is writing it.
            with contextlib.suppress(OSError):
                os.unlink(path)  # noqa: PTH108
                used -= size
        return used
