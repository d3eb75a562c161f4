"""Ranges of objects by signed addresses: what boto3 spends on each GET is spent once an object.

A presigned address (SigV4 in the query) signs the host and nothing else of the head, so Range and If-Match go with it
as they are. The client makes it, and whatever is not a plain answer to a plain request is left to the client: its
errors, redirects and special buckets are its own. An address is as good as a key for as long as it holds: it stays in
memory, out of logs and out of errors.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import threading
import time
from collections import OrderedDict
from typing import Any, NamedTuple
from urllib.parse import urlsplit

__all__ = ["Answer", "SignedGets", "Unsuited"]

HOLDS_SECONDS = 3600  # What an address is signed for. Keys of a role may end sooner: then the store says 403.
RENEWED_SECONDS = 1200.0  # Well before that, by this process' clock.
ADDRESSES_KEPT = 4096  # About 600 bytes each.
_ERROR_BYTES = 4096
_SERVER_ERRORS = {500: "InternalError", 502: "502", 503: "ServiceUnavailable", 504: "504"}


class Unsuited(Exception):
    """Not for this way: the client has to do it, or to say what is wrong."""


class Answer(NamedTuple):
    """The head of a 206, and its body."""

    size: int  # Bytes of the whole object.
    etag: str
    body: Any  # urllib3's response: read1, close.


class _Address(NamedTuple):
    url: str
    renewed_at: float


class _Discreet(logging.Filter):
    """Keeps signatures out of the log lines of the libraries below, which tell each request in full at DEBUG."""

    def filter(self, record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if "X-Amz-" in text or text.startswith("Signature:"):
            record.msg, record.args = re.sub(r"(\?|&)X-Amz-\S*|(?<=Signature:)\s.*", "(signed)", text, flags=re.S), ()
        return True


for _name in ("urllib3.connectionpool", "botocore.auth", "botocore.httpsession"):
    logging.getLogger(_name).addFilter(_Discreet())


class SignedGets:
    """Ranged GETs beside `client`, with its endpoint, keys, certificates, proxies and time limits. Thread-safe."""

    def __init__(self, client: Any, session: Any) -> None:
        """`session`: the botocore session that made the client."""
        from botocore.httpsession import URLLib3Session
        from botocore.utils import get_environ_proxies

        config = client.meta.config
        self.client = client
        self._http = URLLib3Session(
            verify=session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE", True),
            proxies=config.proxies if config.proxies is not None else get_environ_proxies(client.meta.endpoint_url),
            proxies_config=config.proxies_config,
            timeout=(config.connect_timeout, config.read_timeout),
            max_pool_connections=config.max_pool_connections,
            client_cert=config.client_cert,
            socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        )
        self._addresses: OrderedDict[tuple[str, str], _Address] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, bucket: str, key: str, first: int, last: int, if_match: str | None) -> Answer:
        """Bytes first to last of an object. The caller closes the body.

        Raises Unsuited, ClientError for an answer of 500 to 504, ConnectionError where there was none.
        """
        headers = {"Range": f"bytes={first}-{last}", "Accept-Encoding": "identity"}
        if if_match is not None:
            headers["If-Match"] = if_match
        address = self._address(bucket, key)
        response = self._send(address.url, headers)
        if response.status == 403:
            # Keys that were rotated, or a clock that jumped: a new address tells it from a door that is closed.
            response.close()
            self._forget(bucket, key, address)
            response = self._send(self._address(bucket, key).url, headers)
        if response.status == 206:
            return self._answer(response, first)
        try:
            if response.status in _SERVER_ERRORS:
                raise _server_error(response)
        finally:
            response.close()
        self._forget(bucket, key)
        raise Unsuited(f"status {response.status}")

    def _answer(self, response: Any, first: int) -> Answer:
        head = response.headers
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", head.get("Content-Range", ""))
        etag = head.get("ETag")
        if found is None or int(found[1]) != first or not etag:
            response.close()
            raise Unsuited(f"Content-Range {head.get('Content-Range')!r}, ETag {etag!r}")
        return Answer(int(found[2]), str(etag), response)

    def _send(self, url: str, headers: dict[str, str]) -> Any:
        from botocore.awsrequest import AWSPreparedRequest, HeadersDict
        from botocore.exceptions import BotoCoreError

        request = AWSPreparedRequest("GET", url, HeadersDict(headers), None, True)
        try:
            return self._http.send(request).raw
        except BotoCoreError as error:
            text = str(error).replace(url, url.partition("?")[0])
        # Outside: an error that hangs on to the one before would show the address in a traceback.
        raise ConnectionError(text)

    # Addresses ------------------------------------------------------------------------------------------------------

    def _address(self, bucket: str, key: str) -> _Address:
        name = bucket, key
        with self._lock:
            known = self._addresses.get(name)
            if known is not None and time.monotonic() < known.renewed_at:
                self._addresses.move_to_end(name)
                return known
        made = self._sign(bucket, key)
        with self._lock:
            self._addresses[name] = made
            while len(self._addresses) > ADDRESSES_KEPT:
                self._addresses.popitem(last=False)
        return made

    def _sign(self, bucket: str, key: str) -> _Address:
        from botocore.exceptions import BotoCoreError

        if bucket.endswith("--x-s3"):
            raise Unsuited("a directory bucket has keys of its own, which hold for minutes")
        now = time.monotonic()
        try:
            url = str(
                self.client.generate_presigned_url(
                    "get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=HOLDS_SECONDS
                )
            )
        except BotoCoreError as error:  # No keys, above all: the client says so better.
            raise Unsuited(type(error).__name__) from None
        if "X-Amz-SignedHeaders=host&" not in urlsplit(url).query + "&":
            raise Unsuited("the address signs more than the host, or nothing")
        return _Address(url, now + RENEWED_SECONDS)

    def _forget(self, bucket: str, key: str, address: _Address | None = None) -> None:
        with self._lock:
            if address is None or self._addresses.get((bucket, key)) is address:
                self._addresses.pop((bucket, key), None)


def _server_error(response: Any) -> Exception:
    """The answer as the client would raise it."""
    from botocore.exceptions import ClientError

    text = response.read(_ERROR_BYTES).decode(errors="replace")
    code, message = (re.search(f"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
    parts = {
        "Code": code[1] if code else _SERVER_ERRORS[response.status],
        "Message": message[1] if message else f"status {response.status}",
    }
    error: Exception = ClientError({"Error": parts}, "GetObject")
    return error
