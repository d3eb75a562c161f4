"""Objects that are files in local folders."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR, S_ISREG

from pipelines.store.errors import Conflict, NotFound, ObjectInfo, StoreError, Unreadable, ends_early

__all__ = [
    "TEMPORARY",
    "copy",
    "etag_of",
    "list_files",
    "read",
    "read_into",
    "remove_leftovers",
    "replacing",
    "stat",
    "write",
]

TEMPORARY = re.compile(r".+\.part-(\d+)-\d+")  # Writes go to NAME.part-PID-THREAD first; listings leave these out.


def etag_of(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


def read(uri: str, start: int | None, length: int | None, if_match: str | None) -> bytes:
    path = Path(uri)
    try:
        with path.open("rb") as file:
            if if_match is not None and etag_of(os.fstat(file.fileno())) != if_match:
                raise Conflict(f"{uri} has changed since it was listed; list it again")
            if start:
                file.seek(start)
            data = file.read(-1 if length is None else length)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFound(f"no such file: {uri}") from None
    except OSError as error:
        raise Unreadable(f"cannot read {uri}: {error.strerror or error}") from error
    if length is not None and len(data) < length:
        raise StoreError(f"{uri}: {length:,} bytes from byte {start or 0:,} wanted, the file ends after {len(data):,}")
    return data


def read_into(uri: str, buffer: memoryview, start: int, if_match: str | None) -> ObjectInfo:
    try:
        with open(uri, "rb", buffering=0) as file:  # noqa: PTH123  a third of the cost of a Path for small reads
            status = os.fstat(file.fileno())
            etag = etag_of(status)
            if if_match is not None and etag != if_match:
                raise Conflict(f"{uri} has changed since it was listed; list it again")
            received = 0
            while received < len(buffer):
                count = os.preadv(file.fileno(), [buffer[received:]], start + received)
                if not count:
                    raise StoreError(ends_early(uri, start, len(buffer), status.st_size))
                received += count
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFound(f"no such file: {uri}") from None
    except OSError as error:
        raise Unreadable(f"cannot read {uri}: {error.strerror or error}") from error
    return ObjectInfo(uri, status.st_size, etag)


def stat(uri: str) -> ObjectInfo:
    try:
        status = Path(uri).stat()
    except (FileNotFoundError, NotADirectoryError):
        raise NotFound(f"no such file: {uri}") from None
    except OSError as error:  # A loop of links.
        raise Unreadable(f"cannot read {uri}: {error.strerror or error}") from error
    if not (S_ISREG(status.st_mode) or S_ISDIR(status.st_mode)):
        raise Unreadable(f"cannot read {uri}: it is a pipe, socket or device")
    return ObjectInfo(uri, status.st_size, etag_of(status))


def list_files(folder: str) -> Iterator[ObjectInfo]:
    files = sorted((path for path in Path(folder).rglob("*") if path.is_file()), key=lambda path: path.as_posix())
    for path in files:
        if TEMPORARY.fullmatch(path.name) or path.name.endswith(".lock"):
            continue
        status = path.stat()
        yield ObjectInfo(path.as_posix(), status.st_size, etag_of(status))


def remove_leftovers(folder: str) -> int:
    """Delete what writers on this host left half-written when they were killed. Returns how many files."""
    left = [path for path in Path(folder).rglob("*.part-*") if (of := TEMPORARY.fullmatch(path.name)) and _is_over(of)]
    for path in left:
        path.unlink(missing_ok=True)
    return len(left)


def _is_over(name: re.Match[str]) -> bool:
    try:
        os.kill(int(name[1]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f"{path.name}.part-{os.getpid()}-{threading.get_ident()}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: OSError) -> StoreError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return StoreError(f"no space left on the disk of {path}; free some and run the same command again")
    return StoreError(f"cannot write {path}: {error.strerror or error}")


def write(path: Path, data: bytes, *, if_absent: bool, if_match: str | None) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not if_absent and if_match is None:
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            return stat(str(path)).etag
        # Compare and replace are two steps: a lock beside the file makes them one for every process of this host.
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            current = stat(str(path)).etag if path.exists() else None
            if (if_absent and current is not None) or (if_match is not None and current != if_match):
                raise Conflict(f"{path} was written by somebody else in the meantime")
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            return stat(str(path)).etag
    except PermissionError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; check its permissions") from None
    except (NotADirectoryError, FileExistsError):
        raise StoreError(f"cannot write {path}: a parent of it is a file") from None
    except OSError as error:  # Before the file itself: its folder, or the lock beside it.
        raise _cannot_write(path, error) from error


def copy(path: Path, target: Path) -> str:
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as temporary, path.open("rb") as source, temporary.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    return stat(str(target)).etag
