"""What a run did not take in, where the version that it made stood already.

A version is known by what it holds. Two states of a source that differ only in bad or ignored files are one version,
and its head.json is written once. So a later run keeps its account beside it, and current.json names it:
manifests/DIGEST/accounts/ID/{quarantine.parquet, for adopted tars anomalies.parquet, account.json last}.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines import store
from pipelines.corpus.errors import MAKE_AGAIN, ManifestError
from pipelines.corpus.head import Head
from pipelines.corpus.tables import encode_table, holds_table
from pipelines.identity import canonical

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["account_place", "read_account", "write_account"]

FIELDS = ("rejected", "bad_fraction", "noted", "ignored", "duplicates", "source", "recipe")


def account_place(manifest: str, name: str) -> str:
    """Where the tables of an account lie; the one without a name is that of head.json."""
    return store.join(manifest, "accounts", name) if name else manifest


def write_account(manifest: str, standing: Head, made: Head, tables: Mapping[str, pa.Table]) -> tuple[Head, str]:
    """The standing head with the account of this run, and the name of that account: "" if it is that of head.json.

    `made` is the head that this run would have written, `tables` what lies beside it as NAME.parquet.
    """
    files = {f"{name}.parquet": encode_table(table) for name, table in sorted(tables.items())}
    fields = _fields(made)
    if canonical(fields) == canonical(_fields(standing)) and all(
        holds_table(store.join(manifest, f"{name}.parquet"), table) for name, table in tables.items()
    ):
        return standing, ""
    total = hashlib.sha256(canonical(fields).encode())
    for name, data in files.items():
        total.update(name.encode() + hashlib.sha256(data).digest())
    account = total.hexdigest()[:16]
    place = account_place(manifest, account)
    for name, data in files.items():
        store.write(store.join(place, name), data)
    store.write_json(store.join(place, "account.json"), fields)
    return dataclasses.replace(standing, **fields), account


def read_account(manifest: str, head: Head, account: str) -> Head:
    """The head with one of its accounts. Raises ManifestError if that is not there."""
    if not account:
        return head
    uri = store.join(account_place(manifest, account), "account.json")
    try:
        value = store.read_json(uri)
        return dataclasses.replace(head, **{name: value[name] for name in FIELDS})
    except store.NotFound:
        raise ManifestError(f"{uri} is missing; {MAKE_AGAIN}") from None
    except (KeyError, TypeError):
        raise ManifestError(f"{uri} is damaged; {MAKE_AGAIN}") from None


def _fields(head: Head) -> dict[str, Any]:
    return {name: getattr(head, name) for name in FIELDS}
