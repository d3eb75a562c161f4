"""What the tests that break the wire share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.store import s3

from .proxy import FaultProxy


@pytest.fixture
def proxy(stack: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """In front of the real object store, for this process alone."""
    with FaultProxy(stack.s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        s3._clients.clear()
        yield proxy
    s3._clients.clear()
