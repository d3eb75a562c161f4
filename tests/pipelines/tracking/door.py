"""A TCP door before a server that a test can shut and open: what a client sees when the server is down."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class Door:
    """Forwards 127.0.0.1:`port` to the server while open; refuses and cuts connections while shut."""

    def __init__(self, host: str, server_port: int) -> None:
        self._target = (host, server_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._names = (f"Host: 127.0.0.1:{self.port}".encode(), f"Host: {host}:{server_port}".encode())
        self._open: set[socket.socket] = set()
        self.is_shut = False
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                inner, _ = self._listener.accept()
            except OSError:
                return
            if self.is_shut:
                inner.close()
                continue
            outer = socket.create_connection(self._target)
            self._open |= {inner, outer}
            for source, sink in ((inner, outer), (outer, inner)):
                threading.Thread(target=self._pump, args=(source, sink, inner), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, inner: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                # MLflow answers only to its own name in the Host header.
                sink.sendall(data.replace(*self._names) if source is inner else data)
        for end in (source, sink):
            self._open.discard(end)
            end.close()

    def shut(self) -> None:
        self.is_shut = True
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        self.is_shut = False

    def close(self) -> None:
        self.shut()
        self._listener.close()
