"""Addresses, and where corpora and runs live."""

from __future__ import annotations

import os

from pipelines.store.errors import StoreError

__all__ = ["is_s3", "join", "lack_of_space", "root", "split_s3"]


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


def split_s3(uri: str, may_be_bucket: bool = False) -> tuple[str, str]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    if not bucket or not (key or may_be_bucket):
        raise StoreError(f"{uri!r} is not an S3 address; it reads s3://BUCKET/KEY")
    return bucket, key
