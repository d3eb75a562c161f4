"""Objects in S3: one client a process, and a retry that goes on from the last byte."""

from __future__ import annotations

import base64
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from pipelines.store.errors import Conflict, NotFound, ObjectInfo, StoreError, ends_early
from pipelines.store.place import lack_of_space, root, split_s3
from pipelines.store.signed import Answer, SignedGets, Unsuited

__all__ = ["client", "delete", "download", "list_objects", "read", "read_into", "stat", "upload", "write"]

T = TypeVar("T")
log = logging.getLogger(__name__)

ATTEMPTS = 8  # About 12 s in all: a restarted object store refuses its first writes for up to 5 s.
READ_BYTES = 1 << 20
STALL_SECONDS = 30.0  # Without a byte; then the connection is given up and the read goes on from its last byte.

_clients: dict[tuple[int, float], Any] = {}
_signed: dict[tuple[int, float], SignedGets] = {}  # Beside each client.
_clients_lock = threading.Lock()


def client(stall_seconds: float = STALL_SECONDS) -> Any:
    """The boto3 S3 client of this process; thread-safe. A forked child gets its own."""
    with _clients_lock:
        key = os.getpid(), stall_seconds
        if key not in _clients:
            if "AWS_ACCESS_KEY_ID" not in os.environ and "VIT_ROOT" not in os.environ:
                root()
            import boto3
            import botocore.session
            from botocore.config import Config

            from pipelines.store.signing import hash_payload_once

            for other in [known for known in _clients if known[0] != key[0]]:
                del _clients[other]
                _signed.pop(other, None)
            session = botocore.session.get_session()
            _clients[key] = boto3.session.Session(botocore_session=session).client(
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
            hash_payload_once(_clients[key])
            _signed[key] = SignedGets(_clients[key], session)
        return _clients[key]


def read(uri: str, start: int | None, length: int | None, if_match: str | None) -> bytes:
    bucket, key = split_s3(uri)
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


def read_into(uri: str, buffer: memoryview, start: int, if_match: str | None, stall_seconds: float) -> ObjectInfo:
    bucket, key = split_s3(uri)
    received, size, etag = 0, -1, if_match

    def once() -> ObjectInfo:
        nonlocal received, size, etag
        last = start + len(buffer) - 1
        size, etag, body = _open_range(bucket, key, start + received, last, etag, stall_seconds)
        with body as raw:
            # read1 gives what has come: read would wait for all of it, and lose it when the connection breaks.
            while received < len(buffer):
                piece = raw.read1(min(READ_BYTES, len(buffer) - received))
                if not piece:
                    break
                buffer[received : received + len(piece)] = piece
                received += len(piece)
        if received < len(buffer):
            if size < start + len(buffer):
                raise StoreError(ends_early(uri, start, len(buffer), size))
            raise ConnectionError(f"body ended at byte {start + received:,}")
        return ObjectInfo(uri, size, etag)

    try:
        return _retry(uri, f"read byte {start:,} and on of", once, lambda: received)
    except StoreError as error:
        if received and not isinstance(error, NotFound | Conflict):
            raise StoreError(f"{error} (got as far as byte {start + received:,})") from error
        raise


def _open_range(bucket: str, key: str, first: int, last: int, if_match: str | None, stall_seconds: float) -> Answer:
    """The answer to one ranged GET: by a signed address, at half the CPU of the client, or else by the client."""
    by_client = client(stall_seconds)
    signed = _signed.get((os.getpid(), stall_seconds))
    if signed is not None and signed.client is by_client:
        try:
            return signed.get(bucket, key, first, last, if_match)
        except Unsuited as reason:
            log.debug("s3://%s/%s: asking the client: %s", bucket, key, reason)
    options: dict[str, Any] = {"Bucket": bucket, "Key": key, "Range": f"bytes={first}-{last}"}
    if if_match is not None:
        options["IfMatch"] = if_match
    response = by_client.get_object(**options)
    return Answer(int(response["ContentRange"].rpartition("/")[2]), str(response["ETag"]), response["Body"])


def stat(uri: str) -> ObjectInfo:
    bucket, key = split_s3(uri)
    head = _retry(uri, "stat", lambda: client().head_object(Bucket=bucket, Key=key))
    return ObjectInfo(uri, int(head["ContentLength"]), head["ETag"])


def list_objects(prefix: str) -> Iterator[ObjectInfo]:
    bucket, key = split_s3(prefix if prefix.endswith("/") else prefix + "/", may_be_bucket=True)
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


def download(uri: str, path: Path) -> None:
    bucket, key = split_s3(uri)
    _retry(uri, "download", lambda: client().download_file(bucket, key, str(path)))


def write(uri: str, data: bytes, if_absent: bool, if_match: str | None, sha256: str | None) -> str:
    bucket, key = split_s3(uri)
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
            if conditional and _code(error) in _CONFLICT and read(uri, None, None, None) == data:
                return stat(uri).etag
            raise

    return _retry(uri, "write", once)


def upload(path: Path, uri: str) -> str:
    bucket, key = split_s3(uri)
    _retry(uri, "upload", lambda: client().upload_file(str(path), bucket, key))
    return stat(uri).etag


def delete(uri: str) -> None:
    bucket, key = split_s3(uri)
    _retry(uri, "delete", lambda: client().delete_object(Bucket=bucket, Key=key))


# Errors --- ----------------------------------------------------------------------------------------------------------

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
_REFUSED = {"SignatureDoesNotMatch", "InvalidAccessKeyId", "ExpiredToken", "InvalidToken", "TokenRefreshRequired"}
_TOO_LONG = "the store failed at each try; run the same command again in a minute (`vit status` names its log)"


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
                bucket = split_s3(uri, may_be_bucket=True)[0]
                hint = f": there is no bucket {bucket!r}; check the name or create it" if code == "NoSuchBucket" else ""
                raise NotFound(f"no such object: {uri}{hint}") from None
            if code in _CONFLICT:
                raise Conflict(f"{uri} was written by somebody else in the meantime") from None
            if code not in _TRANSIENT or attempt == ATTEMPTS:
                hint = lack_of_space() or f"; {_TOO_LONG}" if code in _TRANSIENT else ""
                if "403" in str(error) or "Denied" in code or code in _REFUSED:
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
