"""What is odd about tars that others wrote. Found while they are indexed; listed in anomalies.parquet of the manifest.

An anomaly says what a person should look at; what cannot be used as a sample is in quarantine besides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ANOMALIES", "Anomalies", "Anomaly", "anomaly_table"]

ANOMALIES = {
    "damaged": "the tar breaks off, or its bytes are no tar from there on: what follows is lost",
    "no_end_mark": "no end-of-archive mark: the tar may have been cut short",
    "trailing_data": "bytes after the end-of-archive mark, which no tar reader reads",
    "no_sample": "a tar in which no sample is usable",
    "unsupported_member": "a link, device, sparse file or the like: never followed, never read",
    "unsafe_name": "a member name that leaves the archive or is not UTF-8",
    "loose_member": "a member whose name has no dot or no stem: it belongs to no sample",
    "missing_member": "a sample without an image or without a usable label",
    "duplicate_member": "a sample with two members of one extension",
    "dotted_key": "a dot in the key: readers take what follows the first dot for the extension",
    "scattered_key": "members of one sample do not lie together: readers see several samples",
    "repeated_key": "a key that two whole samples of one tar have",
    "shared_key": "a key that samples of several tars have",
    "label_conflict": "the .cls and the .json of a sample say different labels; .cls holds",
    "oversized_sample": "a sample whose members take more bytes together than one read should",
}
LISTED = 100  # Of each kind and tar; all are counted.


@dataclass(frozen=True, slots=True)
class Anomaly:
    kind: str  # One of ANOMALIES.
    shard: str  # Path of the tar relative to the source.
    offset: int  # Byte in the tar, -1: the whole of it.
    key: str
    detail: str


class Anomalies:
    """Those of one tar: all counted, the first of each kind listed."""

    def __init__(self, shard: str) -> None:
        self._shard = shard
        self.counts: Counter[str] = Counter()
        self.listed: list[Anomaly] = []

    def add(self, kind: str, offset: int = -1, key: str = "", detail: str = "") -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= LISTED:
            self.listed.append(Anomaly(kind, self._shard, offset, key, detail))


def anomaly_table(found: Iterable[Anomaly]) -> pa.Table:
    import pyarrow as pa

    order = {kind: number for number, kind in enumerate(ANOMALIES)}
    rows = sorted(found, key=lambda one: (order[one.kind], one.shard, one.offset, one.key))
    names = ("kind", "shard", "key", "detail")
    columns = {name: pa.array([getattr(row, name) for row in rows], pa.string()) for name in names}
    return pa.table(columns | {"offset": pa.array([row.offset for row in rows], pa.int64())})
