"""Pages of a shard as bytes: ranged reads into buffers that are used again, one request for pages side by side.

`store.read_into` resumes a broken body from its last byte and retries with jitter. Here the shard is checked to be the
one of the manifest, and errors name shard and byte. A page that cannot be had is always an error, never a masked row.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from pipelines import store
from pipelines.reader.buffers import Buffers
from pipelines.reader.cache import CacheError, PageCache

__all__ = ["CacheConfig", "FetchError", "Page", "PageSpan", "fetch", "replaced"]

log = logging.getLogger(__name__)

SHARDS_KEPT = 4096  # ETags a process remembers, about 200 bytes each.
LONGEST_READ = 32 << 20  # Bytes in one request, so that a lost connection loses little and memory stays bounded.
STALL_SECONDS = 10.0  # Without a byte, until the connection is given up.


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


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """Where a node keeps pages, and how many bytes of them."""

    folder: str
    max_bytes: int


class Page(NamedTuple):
    """A page's bytes, and the version of its shard."""

    data: memoryview
    etag: str


_buffers = Buffers()
_etags: OrderedDict[str, str] = OrderedDict()
_etags_lock = threading.Lock()


def fetch(spans: Sequence[PageSpan], cache: CacheConfig | None = None) -> list[Page]:
    """Each page, in the order given. The memory is used again when the last view of it is gone."""
    kept = _cache(cache) if cache is not None else None
    pages: dict[PageSpan, Page] = {}
    if kept is not None:
        pages = {span: page for span in spans if (page := _read_kept(kept, span)) is not None}
    for run in _runs([span for span in spans if span not in pages]):
        first, last = run[0], run[-1]
        data, etag = _read(first, last.offset + last.length - first.offset)
        for span in run:
            at = span.offset - first.offset
            page = pages[span] = Page(data[at : at + span.length], etag)
            if kept is not None:
                kept.put(span.uri, page.etag, span.offset, page.data)
    return [pages[span] for span in spans]


@lru_cache(maxsize=4)
def _cache(config: CacheConfig) -> PageCache | None:
    """None, with one warning, on a node that cannot have the folder: a cache costs speed, never the run."""
    try:
        return PageCache(config.folder, config.max_bytes)
    except CacheError as error:
        log.warning("%s; this process reads without a cache", error)
        return None


def _read_kept(cache: PageCache, span: PageSpan) -> Page | None:
    """The page from the node's disk, while the store still has the shard that it belongs to."""
    etag = _known_etag(span.uri)
    if etag is None:
        try:
            found = store.stat(span.uri)
        except store.StoreError:
            return None  # Reading it says what is wrong.
        if found.size != span.shard_bytes:
            raise FetchError(_wrong_size(span, found.size))
        etag = found.etag
        _remember(span.uri, etag)
    data = _buffers.take(span.length).data
    return Page(data, etag) if cache.get(span.uri, etag, span.offset, data) else None


def replaced(uri: str, where: str = "") -> FetchError:
    """The error for a shard that has become another one."""
    return FetchError(
        f"{uri} was replaced while it was read{where}; shards never change: write a new corpus version instead"
    )


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


def _read(span: PageSpan, length: int) -> Page:
    buffer = _buffers.take(length).data
    where = f"{span.uri}: bytes {span.offset:,} to {span.offset + length:,}"
    known = _known_etag(span.uri)
    try:
        found = store.read_into(span.uri, buffer, span.offset, if_match=known, stall_seconds=STALL_SECONDS)
    except store.NotFound:
        raise FetchError(
            f"{span.uri} is missing, but the manifest lists it; restore it or make a new version"
        ) from None
    except store.Conflict:
        _forget(span.uri)
        raise replaced(span.uri, f" (at byte {span.offset:,})") from None
    except store.StoreError as error:
        _check_size(span, error)
        raise FetchError(f"{where} cannot be read: {error}") from error
    if found.size != span.shard_bytes:
        raise FetchError(_wrong_size(span, found.size))
    _remember(span.uri, found.etag)
    return Page(buffer, found.etag)


def _check_size(span: PageSpan, error: store.StoreError) -> None:
    """A shard that ends too early has a better explanation than the failed request."""
    try:
        size = store.stat(span.uri).size
    except store.StoreError:
        return
    if size != span.shard_bytes:
        raise FetchError(_wrong_size(span, size)) from error


def _wrong_size(span: PageSpan, size: int) -> str:
    return (
        f"{span.uri} has {size:,} bytes, the manifest says {span.shard_bytes:,}: truncated or replaced"
        "; restore it or make a new corpus version"
    )


# A process holds on to the first ETag that it saw of a shard: whatever replaces the shard is then refused.


def _known_etag(uri: str) -> str | None:
    with _etags_lock:
        if uri in _etags:
            _etags.move_to_end(uri)
        return _etags.get(uri)


def _remember(uri: str, etag: str) -> None:
    with _etags_lock:
        _etags[uri] = etag
        while len(_etags) > SHARDS_KEPT:
            _etags.popitem(last=False)


def _forget(uri: str) -> None:
    with _etags_lock:
        _etags.pop(uri, None)
