"""Ranged reads by signed addresses: the same laws as by the client, and the address is seen by nobody."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pipelines import store
from pipelines.store import s3, signed

from .proxy import Fault, FaultProxy, Kind, Request

pytestmark = pytest.mark.stack
DATA = np.random.default_rng(1).bytes(3_000_000)


@pytest.fixture
def uri(stack: Any) -> str:
    uri = store.join(store.root(), "signed", f"{time.time_ns()}", "a b+ü.tar")
    store.write(uri, DATA)
    return uri


def read(uri: str, start: int = 1_000_000, size: int = 500_000, **options: Any) -> store.ObjectInfo:
    buffer = memoryview(bytearray(size))
    found = store.read_into(uri, buffer, start, stall_seconds=1.0, **options)
    assert buffer == DATA[start : start + size]
    return found


def gets(proxy: FaultProxy) -> list[Request]:
    return [request for request in proxy.requests if request.method == "GET"]


def addresses() -> Any:
    """What this process keeps."""
    return s3._signed[os.getpid(), 1.0]._addresses


def test_one_address_serves_all_ranges_of_an_object(proxy: FaultProxy, uri: str) -> None:
    info = read(uri)
    assert info == store.stat(uri) and info.size == len(DATA)
    assert read(uri, 7, 1, if_match=info.etag) == info
    first, second = gets(proxy)
    assert first.path == second.path and "X-Amz-Signature=" in first.path
    assert "range: bytes=1000000-1499999" in first.head and "authorization:" not in first.head
    assert f"if-match: {info.etag}" in second.head


@pytest.mark.parametrize("kind", ["unavailable", "reset", "truncate", "stall"])
def test_what_breaks_goes_on_from_the_last_byte_of_the_same_object(kind: Kind, proxy: FaultProxy, uri: str) -> None:
    proxy.add(Fault(kind, method="GET", after=70_000, times=2))
    info = read(uri)
    assert [request.fault for request in gets(proxy)] == [kind, kind, None]
    if kind != "unavailable":
        assert "range: bytes=1140000-" in gets(proxy)[2].head and f"if-match: {info.etag}" in gets(proxy)[2].head
    assert all("X-Amz-Signature=" in request.path for request in gets(proxy))


def test_errors_are_those_of_the_client(proxy: FaultProxy, uri: str) -> None:
    etag = store.stat(uri).etag
    with pytest.raises(store.NotFound, match="no such object"):
        read(uri + ".not")
    with pytest.raises(store.StoreError, match="the object ends after 3,000,000"):
        read(uri, len(DATA) - 10, 20)
    with pytest.raises(store.StoreError, match=r"(?i)range"):
        read(uri, len(DATA) + 10, 20)
    store.write(uri, b"another")
    with pytest.raises(store.Conflict):
        read(uri, if_match=etag)


def test_an_address_is_renewed_before_it_ends(proxy: FaultProxy, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read(uri)
    ((name, address),) = addresses().items()
    read(uri)
    assert addresses()[name] is address and address.renewed_at < time.monotonic() + signed.HOLDS_SECONDS / 2
    addresses()[name] = address._replace(renewed_at=time.monotonic() - 1)
    read(uri)
    assert addresses()[name].renewed_at > time.monotonic()


def test_an_address_that_is_refused_is_renewed_once(proxy: FaultProxy, uri: str) -> None:
    """As after a rotation of keys: the old address says 403, a new one does not."""
    read(uri)
    ((name, address),) = addresses().items()
    addresses()[name] = address._replace(url=address.url[:-4] + "0000")
    proxy.clear()
    read(uri)
    assert len(gets(proxy)) == 2
    read(uri)
    assert len(gets(proxy)) == 3


def test_few_addresses_are_kept(proxy: FaultProxy, uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signed, "ADDRESSES_KEPT", 2)
    for number in range(4):
        store.write(f"{uri}-{number}", DATA)
        read(f"{uri}-{number}")
    assert [name[1][-1] for name in addresses()] == ["2", "3"]


def closed_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"http://127.0.0.1:{server.getsockname()[1]}"


def fails(proxy: FaultProxy, uri: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way to fail, and what the message must say."""
    yield "no such object", lambda: read(uri + ".not")
    yield "somebody else", lambda: read(uri, if_match='"0"')
    kinds: tuple[Kind, ...] = ("unavailable", "reset", "truncate", "stall", "lost_response")
    for kind in kinds:
        proxy.clear()
        proxy.add(Fault(kind, times=None))
        yield "cannot read byte 1,000,000 and on of", lambda: read(uri)
    proxy.clear()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another-key-than-the-store-has")
    s3._clients.clear()
    yield "check the credentials", lambda: read(uri)
    monkeypatch.setenv("AWS_ENDPOINT_URL", closed_port())
    s3._clients.clear()
    yield "is http://127.0.0.1:[0-9]+ up", lambda: read(uri)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    s3._clients.clear()
    yield "AWS_ACCESS_KEY_ID", lambda: read(uri)


def test_no_key_and_no_signature_is_told(
    proxy: FaultProxy, uri: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By no error, by no traceback, and by no log at any level."""
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    secrets = [os.environ["AWS_SECRET_ACCESS_KEY"], "another-key-than-the-store-has"]
    told: list[str] = []
    with caplog.at_level(logging.DEBUG):
        read(uri)
        for said, call in fails(proxy, uri, monkeypatch):
            with pytest.raises(store.StoreError, match=said) as caught:
                call()
            told += [str(caught.value), "".join(traceback.format_exception(caught.value))]
        told.append(caplog.text)
    text = "\n".join(told)
    signatures = {
        found for request in proxy.requests for found in re.findall(r"X-Amz-Signature=([0-9a-f]{64})", request.path)
    }
    assert signatures and "GET" in caplog.text
    assert not [secret for secret in (*secrets, *signatures) if secret in text]
    assert "X-Amz-Signature=" not in text
