"""A payload whose sha256 is known is not hashed a second time to be signed."""

from __future__ import annotations

import base64
from typing import Any

from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth

__all__ = ["hash_payload_once"]

SIGNATURE = "s3v4-known-sha256"
CHECKSUM = "x-amz-checksum-sha256"


class _KnownPayload(S3SigV4Auth):  # type: ignore[misc,unused-ignore]
    """Signature Version 4 over the hash that the request carries as its checksum."""

    def payload(self, request: Any) -> str:
        checksum = request.headers.get(CHECKSUM)
        if checksum is None:
            return str(super().payload(request))
        return base64.b64decode(checksum).hex()


def hash_payload_once(client: Any) -> None:
    """Sign the PUTs of a boto3 S3 client by the sha256 that they are given, where they are given one.

    Over plain HTTP botocore hashes each body to sign it, at each try. What the store checks stays the same: the
    signature covers the hash of the bytes that were meant.
    """
    AUTH_TYPE_MAPS[SIGNATURE] = _KnownPayload
    client.meta.events.register("choose-signer.s3.PutObject", _choose)


def _choose(signature_version: Any, **_: Any) -> str | None:
    """None: as botocore would. A presigned URL, or a store that takes no signature, is not ours to change."""
    return SIGNATURE if signature_version in ("s3v4", "v4") else None
