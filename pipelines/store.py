"""Objects in S3 and files in local folders behind one set of functions.

A URI is `s3://bucket/key` or a local path. Where things are (endpoint, credentials) comes from the environment alone.
Writes are atomic: a reader sees the old object or the new one. Conditional writes (`if_absent`, `if_match`) are the one
lock of the project; the loser gets `Conflict`.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
    "root",
    "stat",
    "upload",
    "write",
    "write_json",
]

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 8  # About 12 s in all: a restarted object store refuses its first writes for up to 5 s.
READ_BYTES = 1 << 20
STALL_SECONDS = 30.0  # Without a byte; then the connection is given up and the read goes on from its last byte.
TEMPORARY = ".part-"  # Local writes go to NAME.part-PID first; listings leave such names out.

_clients: dict[tuple[int, float], Any] = {}
_clients_lock = threading.Lock()


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


def root() -> str:
    """Where corpora and runs live (VIT_ROOT), such as "s3://vit". Puts the endpoints into the environment if needed."""
    if "VIT_ROOT" not in os.environ:
        from infra.endpoints import ensure

        ensure()
    return os.environ["VIT_ROOT"].rstrip("/")


def lack_of_space() -> str:
    """To end an error message with: what the embedded store cannot say itself when its disk is full; else nothing."""
    from infra.endpoints import lack_of_space as found

    return f"; {sentence}, and run the same command again a minute later" if (sentence := found()) else ""


def is_s3(uri: str) -> bool:
    return uri.startswith("s3://")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts if part.strip("/"))])


def client(stall_seconds: float = STALL_SECONDS) -> Any:
    """The boto3 S3 client of this process; thread-safe. A forked child gets its own."""
    with _clients_lock:
        key = os.getpid(), stall_seconds
        if key not in _clients:
            if "AWS_ACCESS_KEY_ID" not in os.environ and "VIT_ROOT" not in os.environ:
                root()
            import boto3
            from botocore.config import Config

            for other in [known for known in _clients if known[0] != key[0]]:
                del _clients[other]
            _clients[key] = boto3.session.Session().client(
                "s3",
                config=Config(
                    signature_version="s3v4",
                    connect_timeout=5,
                    read_timeout=stall_seconds,
                    max_pool_connections=32,
                    retries={"mode": "standard", "max_attempts": 3},
                    s3={"addressing_style": "path"} if os.environ.get("AWS_ENDPOINT_URL") else {},
                ),
            )
        return _clients[key]


# Reading ------------------------------------------------------------------------------------------------------------


def read(uri: str, start: int | None = None, length: int | None = None, *, if_match: str | None = None) -> bytes:
    """The object's bytes, or `length` bytes from `start`.

    A connection that breaks in mid-body is resumed from the last byte, never from the start, and only while the object
    is still the same one. Raises NotFound, Conflict (the object changed), StoreError.
    """
    if length == 0:
        return b""
    if not is_s3(uri):
        return _read_local(uri, start, length, if_match)
    bucket, key = _split(uri)
    received = bytearray()
    wanted = length
    etag = if_match

    def once() -> bytes:
        nonlocal etag, wanted
        options: dict[str, Any] = {"Bucket": bucket, "Key": key}
        first = (start or 0) + len(received)
        if start is not None or length is not None or received:
            last = "" if wanted is None else str((start or 0) + wanted - 1)
            options["Range"] = f"bytes={first}-{last}"
        if etag is not None:
            options["IfMatch"] = etag
        response = client().get_object(**options)
        etag = response["ETag"]
        if wanted is None:
            wanted = len(received) + int(response["ContentLength"])
        body = response["Body"]
        try:
            while chunk := body.read(READ_BYTES):
                received.extend(chunk)
        finally:
            body.close()
        if len(received) < wanted:
            if length is not None and int(response["ContentLength"]) < wanted - (first - (start or 0)):
                raise StoreError(
                    f"{uri}: {length:,} bytes from byte {start or 0:,} wanted, the object ends after {len(received):,}"
                )
            raise ConnectionError(f"body ended after {len(received):,} of {wanted:,} bytes")
        return bytes(received)

    return _retry(uri, "read", once)


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
        return _read_local_into(uri, buffer, start, if_match)
    bucket, key = _split(uri)
    received, size, etag = 0, -1, if_match

    def once() -> ObjectInfo:
        nonlocal received, size, etag
        options: dict[str, Any] = {"Bucket": bucket, "Key": key}
        options["Range"] = f"bytes={start + received}-{start + len(buffer) - 1}"
        if etag is not None:
            options["IfMatch"] = etag
        response = client(stall_seconds).get_object(**options)
        etag = str(response["ETag"])
        size = int(response["ContentRange"].rpartition("/")[2])
        with response["Body"] as raw:
            # read1 gives what has come: read would wait for all of it, and lose it when the connection breaks.
            while received < len(buffer):
                piece = raw.read1(min(READ_BYTES, len(buffer) - received))
                if not piece:
                    break
                buffer[received : received + len(piece)] = piece
                received += len(piece)
        if received < len(buffer):
            if size < start + len(buffer):
                raise StoreError(_ends_early(uri, start, len(buffer), size))
            raise ConnectionError(f"body ended at byte {start + received:,}")
        return ObjectInfo(uri, size, etag)

    try:
        return _retry(uri, f"read byte {start:,} and on of", once, lambda: received)
    except StoreError as error:
        if received and not isinstance(error, NotFound | Conflict):
            raise StoreError(f"{error} (got as far as byte {start + received:,})") from error
        raise


def _ends_early(uri: str, start: int, length: int, size: int) -> str:
    return f"{uri}: {length:,} bytes from byte {start:,} wanted, the object ends after {size:,}"


def _read_local_into(uri: str, buffer: memoryview, start: int, if_match: str | None) -> ObjectInfo:
    try:
        with open(uri, "rb", buffering=0) as file:  # noqa: PTH123  a third of the cost of a Path for small reads
            status = os.fstat(file.fileno())
            etag = _local_etag(status)
            if if_match is not None and etag != if_match:
                raise Conflict(f"{uri} has changed since it was listed; list it again")
            received = 0
            while received < len(buffer):
                count = os.preadv(file.fileno(), [buffer[received:]], start + received)
                if not count:
                    raise StoreError(_ends_early(uri, start, len(buffer), status.st_size))
                received += count
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFound(f"no such file: {uri}") from None
    except OSError as error:
        raise Unreadable(f"cannot read {uri}: {error.strerror or error}") from error
    return ObjectInfo(uri, status.st_size, etag)


def _read_local(uri: str, start: int | None, length: int | None, if_match: str | None) -> bytes:
    path = Path(uri)
    try:
        with path.open("rb") as file:
            if if_match is not None and _local_etag(os.fstat(file.fileno())) != if_match:
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


def stat(uri: str) -> ObjectInfo:
    if not is_s3(uri):
        try:
            status = Path(uri).stat()
        except (FileNotFoundError, NotADirectoryError):
            raise NotFound(f"no such file: {uri}") from None
        return ObjectInfo(uri, status.st_size, _local_etag(status))
    bucket, key = _split(uri)
    head = _retry(uri, "stat", lambda: client().head_object(Bucket=bucket, Key=key))
    return ObjectInfo(uri, int(head["ContentLength"]), head["ETag"])


def exists(uri: str) -> bool:
    try:
        stat(uri)
    except NotFound:
        return False
    return True


def list_objects(prefix: str) -> Iterator[ObjectInfo]:
    """Everything below `prefix` (a folder), sorted by URI. Empty if there is nothing; NotFound for a missing bucket."""
    if not is_s3(prefix):
        base = Path(prefix)
        files = sorted((path for path in base.rglob("*") if path.is_file()), key=lambda path: path.as_posix())
        for path in files:
            if TEMPORARY in path.name or path.name.endswith(".lock"):
                continue
            status = path.stat()
            yield ObjectInfo(path.as_posix(), status.st_size, _local_etag(status))
        return
    bucket, key = _split(prefix if prefix.endswith("/") else prefix + "/", may_be_bucket=True)
    token: dict[str, str] = {}
    while True:
        options = {"Bucket": bucket, "Prefix": key.lstrip("/"), **token}
        page = _retry(prefix, "list", lambda options=options: client().list_objects_v2(**options))  # type: ignore[misc]
        for item in page.get("Contents", ()):
            if not item["Key"].endswith("/"):
                yield ObjectInfo(f"s3://{bucket}/{item['Key']}", int(item["Size"]), item["ETag"])
        if not page.get("IsTruncated"):
            return
        token = {"ContinuationToken": page["NextContinuationToken"]}


def download(uri: str, path: Path) -> Path:
    """Copy an object to a local file; the file appears only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _local_write(path) as temporary:
        if is_s3(uri):
            bucket, key = _split(uri)
            _retry(uri, "download", lambda: client().download_file(bucket, key, str(temporary)))
        else:
            temporary.write_bytes(read(uri))
    return path


# Writing ------------------------------------------------------------------------------------------------------------


def write(
    uri: str, data: bytes, *, if_absent: bool = False, if_match: str | None = None, sha256: str | None = None
) -> str:
    """Write the whole object; returns its ETag. `if_absent` and `if_match` raise Conflict when the condition fails.

    A `sha256` (hex) that the caller knows already is the checksum that the store compares.
    """
    if not is_s3(uri):
        return _write_local(Path(uri), data, if_absent=if_absent, if_match=if_match)
    bucket, key = _split(uri)
    options: dict[str, Any] = {"Bucket": bucket, "Key": key, "Body": data}
    if if_absent:
        options["IfNoneMatch"] = "*"
    if if_match is not None:
        options["IfMatch"] = if_match
    if sha256 is not None:
        options["ChecksumSHA256"] = base64.b64encode(bytes.fromhex(sha256)).decode()
    conditional = if_absent or if_match is not None

    def once() -> str:
        try:
            return str(client().put_object(**options)["ETag"])
        except Exception as error:
            # An earlier try (ours, or botocore's own) may have been carried out although its answer was lost: then what
            # stands is what we wrote.
            if conditional and _code(error) in _CONFLICT and read(uri) == data:
                return stat(uri).etag
            raise

    return _retry(uri, "write", once)


def upload(path: Path, uri: str) -> str:
    """Copy a local file to the store; it appears only when whole. Returns its ETag."""
    if not is_s3(uri):
        target = Path(uri)
        target.parent.mkdir(parents=True, exist_ok=True)
        with _local_write(target) as temporary, path.open("rb") as source, temporary.open("wb") as sink:
            while chunk := source.read(READ_BYTES):
                sink.write(chunk)
        return stat(uri).etag
    bucket, key = _split(uri)
    _retry(uri, "upload", lambda: client().upload_file(str(path), bucket, key))
    return stat(uri).etag


def delete(uri: str) -> None:
    """Remove one object; nothing happens if it is not there."""
    if not is_s3(uri):
        Path(uri).unlink(missing_ok=True)
        return
    bucket, key = _split(uri)
    _retry(uri, "delete", lambda: client().delete_object(Bucket=bucket, Key=key))


def read_json(uri: str) -> Any:
    data = read(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StoreError(f"{uri} is not JSON ({error}); delete it and run the same command again") from None


def write_json(uri: str, value: Any, *, if_absent: bool = False, if_match: str | None = None) -> str:
    data = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()
    return write(uri, data, if_absent=if_absent, if_match=if_match)


# Local files --------------------------------------------------------------------------------------------------------


def _local_etag(status: os.stat_result) -> str:
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ino}"


@contextmanager
def _local_write(path: Path) -> Iterator[Path]:
    temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}-{threading.get_ident()}")
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


def _write_local(path: Path, data: bytes, *, if_absent: bool, if_match: str | None) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not if_absent and if_match is None:
            with _local_write(path) as temporary:
                temporary.write_bytes(data)
            return stat(str(path)).etag
        # Compare and replace are two steps: a lock beside the file makes them one for every process of this host.
        with path.with_name(path.name + ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            current = stat(str(path)).etag if path.exists() else None
            if (if_absent and current is not None) or (if_match is not None and current != if_match):
                raise Conflict(f"{path} was written by somebody else in the meantime")
            with _local_write(path) as temporary:
                temporary.write_bytes(data)
            return stat(str(path)).etag
    except PermissionError as error:
        raise StoreError(f"cannot write {path}: {error.strerror}; check its permissions") from None
    except (NotADirectoryError, FileExistsError):
        raise StoreError(f"cannot write {path}: a parent of it is a file") from None
    except OSError as error:  # Before the file itself: its folder, or the lock beside it.
        raise _cannot_write(path, error) from error


# S3 errors ----------------------------------------------------------------------------------------------------------

_MISSING = {"404", "NoSuchKey", "NotFound", "NoSuchBucket"}
_CONFLICT = {"412", "PreconditionFailed", "409", "ConditionalRequestConflict"}
_TRANSIENT = {
    "500",
    "502",
    "503",
    "504",
    "InternalError",
    "SlowDown",
    "ServiceUnavailable",
    "RequestTimeout",
    "Throttling",
}
_TOO_LONG = "the store failed at each try; run the same command again in a minute (`vit status` names its log)"


def _split(uri: str, may_be_bucket: bool = False) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or not (key or may_be_bucket):
        raise StoreError(f"{uri!r} is not an S3 address; it reads s3://BUCKET/KEY")
    return bucket, key


def _code(error: BaseException) -> str:
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _retry(uri: str, verb: str, call: Callable[[], T], received: Callable[[], int] = lambda: 0) -> T:
    """`call` until it succeeds; `received` tells how far it has come, and who comes far enough may try anew."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
    )
    from urllib3.exceptions import HTTPError

    delay, attempt, before = 0.1, 0, 0
    while True:
        attempt += 1
        try:
            try:
                return call()
            except Boto3Error as error:
                # File transfers hide the reason: an upload in the context, a download in an attribute.
                hidden = getattr(error, "last_exception", None) or error.__context__
                raise (
                    hidden if isinstance(hidden, ClientError | BotoCoreError | OSError) else ConnectionError(error)
                ) from None
        except (NoCredentialsError, PartialCredentialsError) as error:
            raise StoreError(
                f"cannot {verb} {uri}: {error}; start the embedded stack with `vit up`, or set AWS_ACCESS_KEY_ID"
            ) from None
        except ParamValidationError as error:
            raise StoreError(f"cannot {verb} {uri}: {error}") from None
        except ClientError as error:
            code = _code(error)
            if code in _MISSING:
                bucket = _split(uri, may_be_bucket=True)[0]
                hint = f": there is no bucket {bucket!r}; check the name or create it" if code == "NoSuchBucket" else ""
                raise NotFound(f"no such object: {uri}{hint}") from None
            if code in _CONFLICT:
                raise Conflict(f"{uri} was written by somebody else in the meantime") from None
            if code not in _TRANSIENT or attempt == ATTEMPTS:
                hint = lack_of_space() or f"; {_TOO_LONG}" if code in _TRANSIENT else ""
                if "403" in str(error) or "Denied" in code:
                    hint = "; check the credentials and that they may use this bucket"
                raise StoreError(f"cannot {verb} {uri}: {error}{hint}") from error
            problem: Exception = error
        except (BotoCoreError, HTTPError, ConnectionError, TimeoutError) as error:
            if attempt == ATTEMPTS:
                where = os.environ.get("AWS_ENDPOINT_URL", "the S3 endpoint")
                raise StoreError(
                    f"cannot {verb} {uri} after {attempt} tries: {error}; is {where} up? (`vit status`)"
                ) from error
            problem = error
        log.debug("%s %s: try %d failed: %s", verb, uri, attempt, problem)
        if received() >= before + READ_BYTES:
            delay, attempt, before = 0.1, 0, received()
        time.sleep(delay * random.uniform(0.7, 1.3))
        delay = min(delay * 2, 4.0)
