"""Each fault does what it says, seen with the standard library's client on a small server."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from .proxy import Fault, FaultProxy, Kind

BODY = bytes(range(256)) * 1000


class Memory(BaseHTTPRequestHandler):
    """GET gives BODY, in chunks under /chunked; PUT is remembered."""

    protocol_version = "HTTP/1.1"
    stored: dict[str, bytes]

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path.startswith("/chunked"):
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for start in range(0, len(BODY), 100_000):
                piece = BODY[start : start + 100_000]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\n\r\n")
            return
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()

    def do_PUT(self) -> None:
        data = self.rfile.read(int(self.headers["Content-Length"]))
        if len(data) == int(self.headers["Content-Length"]):
            self.stored[self.path] = data
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def stored() -> dict[str, bytes]:
    return {}


@pytest.fixture
def proxy(stored: dict[str, bytes]) -> Iterator[FaultProxy]:
    class Handler(Memory):
        pass

    Handler.stored = stored

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """A connection that the proxy reset is no news."""

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        with FaultProxy(f"http://127.0.0.1:{server.server_port}") as proxy:
            yield proxy
        server.shutdown()


@pytest.fixture
def client(proxy: FaultProxy) -> Iterator[http.client.HTTPConnection]:
    connection = http.client.HTTPConnection(proxy.url.removeprefix("http://"), timeout=1.5)
    yield connection
    connection.close()


def get(client: http.client.HTTPConnection, path: str = "/x") -> bytes:
    client.request("GET", path)
    return client.getresponse().read()


def test_without_a_fault_everything_passes_over_one_connection(
    proxy: FaultProxy, client: http.client.HTTPConnection, stored: dict[str, bytes]
) -> None:
    assert get(client) == get(client, "/chunked") == BODY
    client.request("HEAD", "/x")
    assert client.getresponse().read() == b""
    client.request("PUT", "/y", BODY, {"Expect": "100-continue"})
    assert client.getresponse().status == 200 and stored == {"/y": BODY}
    assert [(request.method, request.path, request.fault) for request in proxy.requests] == [
        ("GET", "/x", None),
        ("GET", "/chunked", None),
        ("HEAD", "/x", None),
        ("PUT", "/y", None),
    ]
    proxy.clear()
    assert proxy.requests == [] and proxy.hits == 0


def test_503_reaches_no_store(proxy: FaultProxy, client: http.client.HTTPConnection, stored: dict[str, bytes]) -> None:
    proxy.add(Fault("unavailable"))
    client.request("PUT", "/y", BODY)
    response = client.getresponse()
    assert response.status == 503 and b"SlowDown" in response.read() and not stored
    assert get(client) == BODY and proxy.hits == 1


@pytest.mark.parametrize("path", ["/x", "/chunked"])
@pytest.mark.parametrize("kind", ["reset", "truncate"])
def test_an_answer_ends_in_mid_body(
    kind: Kind, path: str, proxy: FaultProxy, client: http.client.HTTPConnection
) -> None:
    proxy.add(Fault(kind, after=100_000))
    client.request("GET", path)
    response = client.getresponse()
    received = bytearray()
    try:
        while piece := response.read(1000):
            received += piece
        ended = "truncate"
    except ConnectionResetError:
        ended = "reset"
    except http.client.IncompleteRead as error:
        received += error.partial
        ended = "truncate"
    assert ended == kind and len(received) <= 100_000 and BODY.startswith(received)
    client.close()
    assert get(client) == BODY


def test_a_stalled_answer_gives_its_first_bytes_and_then_none(
    proxy: FaultProxy, client: http.client.HTTPConnection
) -> None:
    proxy.add(Fault("stall", after=5000))
    client.request("GET", "/x")
    response = client.getresponse()
    assert response.read(5000) == BODY[:5000]
    with pytest.raises(TimeoutError):
        response.read(1)


def test_one_bit_is_flipped(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.add(Fault("flip", after=123_456))
    data = get(client)
    assert [i for i in range(len(BODY)) if data[i] != BODY[i]] == [123_456] and len(data) == len(BODY)


def test_an_upload_that_is_cut_is_not_stored_and_one_without_an_answer_is(
    proxy: FaultProxy, client: http.client.HTTPConnection, stored: dict[str, bytes]
) -> None:
    proxy.add(Fault("cut_request", after=1000), Fault("lost_response"))
    for expected in ({}, {"/y": BODY}):
        with pytest.raises((ConnectionError, http.client.RemoteDisconnected)):
            client.request("PUT", "/y", BODY)
            client.getresponse()
        client.close()
        assert stored == expected


def test_faults_choose_their_requests(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.add(Fault("unavailable", method="HEAD", match="/a b", header="x-mark: 7", skip=1, times=2))

    def status(method: str, path: str, mark: str) -> int:
        client.close()
        client.request(method, path, headers={"X-Mark": mark})
        response = client.getresponse()
        response.read()
        return response.status

    assert [status("GET", "/a%20b", "7"), status("HEAD", "/b", "7"), status("HEAD", "/a%20b", "8")] == [200] * 3
    assert [status("HEAD", "/a%20b", "7") for _ in range(4)] == [200, 503, 503, 200]


def test_chance_follows_the_seed(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.add(Fault("flip", after=0, times=None, chance=0.5))
    outcomes = [get(client)[0] for _ in range(30)]
    assert 5 < sum(outcomes) < 25 and proxy.hits == sum(outcomes)


def test_a_delay_holds_the_request_back(proxy: FaultProxy, client: http.client.HTTPConnection) -> None:
    proxy.add(Fault("delay", seconds=5.0))
    client.request("GET", "/x")
    with pytest.raises(TimeoutError):
        client.getresponse()
