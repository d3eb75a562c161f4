"""A TCP proxy that breaks HTTP/1.1 in stated ways. Tests put it between a client and the real object store.

The request head passes unchanged, so the client's signature (which covers the proxy's host and port) stays valid.

    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        proxy.add(Fault("reset", method="GET", match="shards/", after=1000, times=2))
        ...  # with AWS_ENDPOINT_URL=proxy.url
        assert proxy.hits == 2
"""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "FaultProxy", "Kind", "Request"]

Kind = Literal[
    "unavailable",  # 503 SlowDown; the store never sees the request.
    "delay",  # The request waits `seconds` before it goes on.
    "cut_request",  # `after` bytes of the body reach the store, then both connections are reset.
    "lost_response",  # The store carries the request out; the client's connection is reset without an answer.
    "reset",  # `after` bytes of the answer's body, then a reset (RST).
    "truncate",  # `after` bytes of the answer's body, then an orderly close (FIN).
    "stall",  # `after` bytes of the answer's body, then nothing until the proxy closes.
    "flip",  # One bit of byte `after` of the answer's body is wrong.
]

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your rate.</Message></Error>"
PIECE = 1 << 16
MAX_HEAD = 1 << 16


@dataclass(slots=True)
class Fault:
    """What goes wrong, with which requests, and how often."""

    kind: Kind
    method: str = ""  # GET, PUT, ...; empty: any.
    match: str = ""  # Part of the unquoted path with its query.
    header: str = ""  # Part of the request head in lower case, such as "if-none-match".
    after: int = 0  # Bytes.
    seconds: float = 0.0
    skip: int = 0  # Matching requests that pass first.
    times: int | None = 1  # Then so many go wrong; None: all.
    chance: float = 1.0  # Each of them with this probability.


@dataclass(frozen=True, slots=True)
class Request:
    """One request as the proxy saw it."""

    method: str
    path: str
    head: str  # In lower case.
    fault: Kind | None


class _Gone(Exception):
    """One side closed its connection."""


class FaultProxy:
    """Listens on a free port of 127.0.0.1; a thread serves each connection. A context manager."""

    def __init__(self, upstream: str, *, seed: int = 0) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._faults: list[Fault] = []
        self._requests: list[Request] = []
        self._sockets: set[socket.socket] = set()
        self._closed = threading.Event()
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept, name="fault proxy", daemon=True)

    def __enter__(self) -> FaultProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        # A blocked accept() does not notice that another thread closed its socket.
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        with self._lock:
            for one in self._sockets:
                _shut(one)
        self._thread.join(timeout=5)

    def add(self, *faults: Fault) -> None:
        """Each request meets the first fault that matches it and is not used up."""
        with self._lock:
            self._faults += faults

    def clear(self) -> None:
        """No more faults; forget the requests so far."""
        with self._lock:
            self._faults.clear()
            self._requests.clear()

    @property
    def requests(self) -> list[Request]:
        with self._lock:
            return list(self._requests)

    @property
    def hits(self) -> int:
        """Requests that met a fault."""
        return sum(request.fault is not None for request in self.requests)

    # Connections ----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), name="fault proxy client", daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """Requests of one client connection, each over its own connection to the store."""
        self._keep(client)
        wire = _Wire(client)
        try:
            with suppress(_Gone, OSError):  # What a broken connection is for.
                while self._exchange(wire):
                    pass
        finally:
            self._drop(client)

    def _keep(self, one: socket.socket) -> None:
        with self._lock:
            self._sockets.add(one)

    def _drop(self, one: socket.socket) -> None:
        with self._lock:
            self._sockets.discard(one)
        one.close()

    def _choose(self, method: str, path: str, head: str) -> Fault | None:
        with self._lock:
            chosen = next((fault for fault in self._faults if self._applies(fault, method, path, head)), None)
            self._requests.append(Request(method, path, head, chosen.kind if chosen else None))
            return chosen

    def _applies(self, fault: Fault, method: str, path: str, head: str) -> bool:
        if fault.method not in ("", method) or fault.match not in path or fault.header not in head:
            return False
        if fault.skip:
            fault.skip -= 1
            return False
        if fault.times == 0 or self._random.random() >= fault.chance:
            return False
        if fault.times is not None:
            fault.times -= 1
        return True

    def _exchange(self, client: _Wire) -> bool:
        """One request and its answer; whether the client may send another."""
        head, first, fields = client.head()
        method, target, _ = first.split(" ", 2)
        fault = self._choose(method, unquote(target), head.decode("latin-1").lower())
        kind = fault.kind if fault else None
        if fault and kind == "delay":
            self._closed.wait(fault.seconds)
        if kind == "unavailable":
            if "100-continue" not in fields.get("expect", ""):
                client.body(fields, lambda piece: None)
            body = b"" if method == "HEAD" else SLOW_DOWN
            client.send(
                b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
                b"Content-Length: %d\r\n\r\n" % len(SLOW_DOWN) + body
            )
            return False
        upstream = socket.create_connection(self._upstream, timeout=120)
        self._keep(upstream)
        try:
            return self._forward(client, _Wire(upstream), method, head, fields, fault)
        finally:
            self._drop(upstream)

    def _forward(
        self, client: _Wire, store: _Wire, method: str, head: bytes, fields: dict[str, str], fault: Fault | None
    ) -> bool:
        kind = fault.kind if fault else None
        store.send(head)
        answer: tuple[bytes, str, dict[str, str]] | None = None
        if "100-continue" in fields.get("expect", ""):
            answer = store.head()
            if " 100 " in answer[1] + " ":
                client.send(answer[0])
                answer = None
        if answer is None:
            if fault and kind == "cut_request":
                client.body(fields, _Cut(fault.after, store.send, lambda: (store.reset(), client.reset())))
            else:
                client.body(fields, store.send)
            answer = store.head()
        answer_head, status, answer_fields = answer
        code = int(status.split(" ", 2)[1])
        is_empty = method == "HEAD" or code in (204, 304)
        if kind == "lost_response":
            if not is_empty:
                store.body(answer_fields, lambda piece: None)
            client.reset()
            return False
        client.send(answer_head)
        if not is_empty:
            store.body(answer_fields, self._spoilt(client, fault))
        return "close" not in (fields.get("connection", "").lower(), answer_fields.get("connection", "").lower())

    def _spoilt(self, client: _Wire, fault: Fault | None) -> Callable[[bytes], object]:
        match fault.kind if fault else None:
            case "reset":
                return _Cut(fault.after, client.send, client.reset)
            case "truncate":
                return _Cut(fault.after, client.send, client.close)
            case "stall":
                return _Cut(fault.after, client.send, self._closed.wait)
            case "flip":
                return _Flip(fault.after, client.send)
        return client.send


class _Cut:
    """Passes the first bytes of a body on, then ends it."""

    def __init__(self, left: int, send: Callable[[bytes], object], end: Callable[[], object]) -> None:
        self._left, self._send, self._end = left, send, end

    def __call__(self, piece: bytes) -> None:
        if len(piece) <= self._left:
            self._left -= len(piece)
            self._send(piece)
            return
        self._send(piece[: self._left])
        time.sleep(0.02)  # A reset throws away what the other side has not read yet.
        self._end()
        raise _Gone


class _Flip:
    """Passes a body on with one wrong bit."""

    def __init__(self, at: int, send: Callable[[bytes], object]) -> None:
        self._at, self._send = at, send

    def __call__(self, piece: bytes) -> None:
        if 0 <= self._at < len(piece):
            piece = piece[: self._at] + bytes([piece[self._at] ^ 1]) + piece[self._at + 1 :]
        self._at -= len(piece)
        self._send(piece)


class _Wire:
    """One connection, read head by head and body by body."""

    def __init__(self, one: socket.socket) -> None:
        self._socket = one
        self._buffer = b""

    def head(self) -> tuple[bytes, str, dict[str, str]]:
        """The head as it came, its first line, and its fields by lower-case name."""
        while (end := self._buffer.find(b"\r\n\r\n")) < 0:
            if len(self._buffer) > MAX_HEAD:
                raise _Gone
            self._buffer += self._receive()
        raw, self._buffer = self._buffer[: end + 4], self._buffer[end + 4 :]
        first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
        fields = (line.partition(":") for line in lines)
        return raw, first, {name.strip().lower(): value.strip() for name, _, value in fields}

    def body(self, fields: dict[str, str], sink: Callable[[bytes], object]) -> None:
        """Everything that belongs to the body, framing included, goes to `sink`."""
        if fields.get("transfer-encoding", "").lower() == "chunked":
            while True:
                line = self._until(b"\r\n")
                size = int(line.split(b";")[0], 16)
                sink(line)
                if not size:  # Trailer fields, then an empty line.
                    while line != b"\r\n":
                        line = self._until(b"\r\n")
                        sink(line)
                    return
                self._exactly(size + 2, sink)
        self._exactly(int(fields.get("content-length", "0")), sink)

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def reset(self) -> None:
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        _shut(self._socket)

    def _receive(self) -> bytes:
        data = self._socket.recv(PIECE)
        if not data:
            raise _Gone
        return data

    def _until(self, end: bytes) -> bytes:
        while (at := self._buffer.find(end)) < 0:
            self._buffer += self._receive()
        line, self._buffer = self._buffer[: at + len(end)], self._buffer[at + len(end) :]
        return line

    def _exactly(self, size: int, sink: Callable[[bytes], object]) -> None:
        while size:
            piece = self._buffer[:size] or self._receive()
            self._buffer = self._buffer[len(piece) :] if self._buffer else piece[size:]
            piece = piece[:size]
            size -= len(piece)
            sink(piece)


def _shut(one: socket.socket) -> None:
    with suppress(OSError):  # Closed already.
        one.shutdown(socket.SHUT_RDWR)
