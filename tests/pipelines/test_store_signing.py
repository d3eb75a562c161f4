"""A payload is hashed once: by the caller who knows its sha256, or by botocore."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest

from pipelines import store
from pipelines.store import signing

pytestmark = pytest.mark.stack


@pytest.fixture
def uri(stack: Any) -> str:
    return store.join(store.root(), "signing", "object")


def test_a_known_hash_is_signed_and_the_store_holds_the_bytes_against_it(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(3_000_000)
    hashed: list[int] = []
    of_botocore = signing.S3SigV4Auth.payload
    monkeypatch.setattr(
        signing.S3SigV4Auth, "payload", lambda self, request: (hashed.append(1), of_botocore(self, request))[1]
    )
    store.write(uri, data, sha256=hashlib.sha256(data).hexdigest())
    assert not hashed
    store.write(uri, data)
    assert hashed == [1]
    assert store.read(uri) == data
    with pytest.raises(store.StoreError):
        store.write(f"{uri}-other", data, sha256=hashlib.sha256(b"other").hexdigest())
    assert not store.exists(f"{uri}-other")


def test_presigned_urls_stay_as_they_were(uri: str) -> None:
    bucket, key = uri.removeprefix("s3://").split("/", 1)
    url = store.client().generate_presigned_url("put_object", Params={"Bucket": bucket, "Key": key})
    assert "X-Amz-Signature" in url
