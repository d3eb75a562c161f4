"""Pages of a shard as bytes: ranged reads, one request for pages that lie side by side.

`store.read` resumes a broken body from its last byte and retries with jitter. Here the shard is checked to be the one
of the manifest, and errors name shard and byte. A page that cannot be had is always an error, never a masked row.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines import store

__all__ = ["FetchError", "PageSpan", "fetch"]

SHARDS_KEPT = 4096  # Sizes and ETags a process remembers, about 200 bytes each.
LONGEST_READ = 32 << 20  # Bytes in one request, so that a lost connection loses little and memory stays bounded.


class FetchError(RuntimeError):
    """A page cannot be read, or its shard is not the manifest's."""


@dataclass(frozen=True, slots=True)
class PageSpan:
    """Rows [first, last) of a page, and where the page lies."""

    uri: str
    shard_bytes: int  # Size of the shard in the manifest.
    offset: int  # Bytes.
    length: int  # Bytes.
    num_rows: int  # Samples of the whole page.
    first_id: int  # sample_id of the page's row 0.
    first: int
    last: int
    chosen: tuple[int, ...] | None = None  # Samples of the page that are rows, in their order; None: all of them.
    source: int = -1  # Of the corpus: whose tar it is; -1: its own.


_shards: OrderedDict[str, store.ObjectInfo] = OrderedDict()
_shards_lock = threading.Lock()


def fetch(spans: Sequence[PageSpan]) -> list[memoryview]:
    """Bytes of each page, in the order given."""
    pages: list[memoryview] = []
    for run in _runs(spans):
        first, last = run[0], run[-1]
        data = memoryview(_read(first, last.offset + last.length - first.offset))
        pages += [data[span.offset - first.offset : span.offset - first.offset + span.length] for span in run]
    return pages


def _runs(spans: Sequence[PageSpan]) -> list[list[PageSpan]]:
    """Spans grouped into stretches of adjacent bytes."""
    runs: list[list[PageSpan]] = []
    for span in spans:
        if runs:
            head, tail = runs[-1][0], runs[-1][-1]
            adjacent = span.uri == tail.uri and span.offset == tail.offset + tail.length
            if adjacent and span.offset + span.length - head.offset <= LONGEST_READ:
                runs[-1].append(span)
                continue
        runs.append([span])
    return runs


def _read(span: PageSpan, length: int) -> bytes:
    shard = _shard(span)
    try:
        return store.read(span.uri, span.offset, length, if_match=shard.etag)
    except store.Conflict:
        _forget(span.uri)
        raise FetchError(
            f"{span.uri} was replaced while it was read (at byte {span.offset:,})"
            "; shards never change: write a new corpus version instead"
        ) from None
    except store.StoreError as error:
        raise FetchError(
            f"{span.uri}: bytes {span.offset:,} to {span.offset + length:,} cannot be read: {error}"
        ) from error


def _shard(span: PageSpan) -> store.ObjectInfo:
    """Size and ETag of the shard, asked once per process; the size must be the manifest's."""
    with _shards_lock:
        known = _shards.get(span.uri)
        if known is not None:
            _shards.move_to_end(span.uri)
            return known
    try:
        info = store.stat(span.uri)
    except store.NotFound:
        raise FetchError(
            f"{span.uri} is missing, but the manifest lists it; restore it or make a new version"
        ) from None
    except store.StoreError as error:
        raise FetchError(f"{span.uri} (for byte {span.offset:,}): {error}") from error
    if info.size != span.shard_bytes:
        raise FetchError(
            f"{span.uri} has {info.size:,} bytes, the manifest says {span.shard_bytes:,}: truncated or replaced"
            "; restore it or make a new corpus version"
        )
    with _shards_lock:
        _shards[span.uri] = info
        while len(_shards) > SHARDS_KEPT:
            _shards.popitem(last=False)
    return info


def _forget(uri: str) -> None:
    with _shards_lock:
        _shards.pop(uri, None)
