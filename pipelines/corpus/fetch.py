"""The bytes of planned samples. A source that changed since the plan was frozen is an error by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from pipelines import store
from pipelines.corpus.errors import SourceError
from pipelines.corpus.images import MAX_FILE_BYTES, ImageRejected
from pipelines.corpus.listing import local_etag

__all__ = ["Planned", "fetch", "read_listed", "read_source"]

THREADS = 16  # Small objects of a bucket: the answer takes longer than the bytes.
RUN_BYTES = 32 << 20  # Neighbours in a tar are read in one request of at most so much.
APART_BYTES = 512 << 20  # Of images from all over the tars, which are held together: a shard of usual size is one.
RUN_GAP = 256 << 10  # Bytes that are cheaper to read than to leave out.


@dataclass(frozen=True, slots=True)
class Planned:
    """One row of the plan's listing."""

    path: str
    uri: str
    offset: int
    size: int
    etag: str  # Of a sample of another corpus: the start of the sha256 of its image.
    label: int  # -1 where there are several,
    labels: list[int] | None = None  # in order of the class names.


def read_source(uri: str, etag: str, start: int | None = None, length: int | None = None) -> bytes:
    """Bytes of a source object while it is still the one that was listed. Raises SourceError, ImageRejected."""
    if store.is_s3(uri):
        try:
            return store.read(uri, start, length, if_match=etag)
        except store.Conflict:
            raise SourceError(_changed(uri)) from None
        except store.NotFound:
            raise SourceError(f"{uri} is gone since it was listed; run the same command again to list anew") from None
    try:
        with open(uri, "rb") as file:  # noqa: PTH123  a third of the cost of a Path for small files
            status = os.fstat(file.fileno())
            if local_etag(status) != etag:
                raise SourceError(_changed(uri))
            if start:
                file.seek(start)
            return file.read(status.st_size if length is None else length)  # Not to the end: a device has none.
    except FileNotFoundError:
        raise SourceError(f"{uri} is gone since it was listed; run the same command again to list anew") from None
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise
        raise ImageRejected("unreadable", error.strerror or str(error)) from None


def read_listed(uri: str, etag: str, start: int | None = None, length: int | None = None) -> bytes:
    """As `read_source`, of what is no image: a tar, a list, an IDX file. Raises SourceError, which names it."""
    try:
        return read_source(uri, etag, start, length)
    except ImageRejected as error:
        raise SourceError(f"cannot read {uri}: {error.detail}") from None


def _changed(uri: str) -> str:
    return f"{uri} has changed since it was listed; run the same command again to list anew"


def fetch(kind: str, rows: Sequence[Planned]) -> Iterator[bytes | ImageRejected]:
    """One image file, or why there is none, for each row in order."""
    match kind:
        case "idx":
            from pipelines.corpus.idx import encode_png, idx_rows

            for row in rows:
                yield encode_png(idx_rows(row.uri, row.etag)[row.offset])
        case "tars":
            for run in _runs(rows):
                yield from _read_run(run)
        case "tars_shuffled":
            for some in _together(rows, APART_BYTES):
                yield from _read_apart(some)
        case "corpus":
            from pipelines.corpus.recast import read_sample

            with ThreadPoolExecutor(THREADS) as pool:
                for start in range(0, len(rows), 4 * THREADS):
                    yield from pool.map(read_sample, rows[start : start + 4 * THREADS])
        case "files" | "list" if rows and store.is_s3(rows[0].uri):
            with ThreadPoolExecutor(THREADS) as pool:
                for start in range(0, len(rows), 4 * THREADS):
                    yield from pool.map(_read_file, rows[start : start + 4 * THREADS])
        case "files" | "list":
            yield from map(_read_file, rows)


def _read_file(row: Planned) -> bytes | ImageRejected:
    if row.size > MAX_FILE_BYTES:
        return ImageRejected("bomb", f"{row.size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
    try:
        return read_source(row.uri, row.etag)
    except ImageRejected as rejected:
        return rejected


def _together(rows: Sequence[Planned], limit: int) -> Iterator[list[Planned]]:
    """Rows in order, so many together as are below the limit."""
    some: list[Planned] = []
    size = 0
    for row in rows:
        if some and size + row.size > limit:
            yield some
            some, size = [], 0
        some.append(row)
        size += row.size
    if some:
        yield some


def _read_apart(rows: Sequence[Planned]) -> Iterator[bytes | ImageRejected]:
    """Images from all over many tars, each by a request of its own: read in the order of the tars, given in ours."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i].uri, rows[i].offset))

    def read(i: int) -> bytes | ImageRejected:
        row = rows[i]
        if row.size > MAX_FILE_BYTES:
            return ImageRejected("bomb", f"{row.size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        return read_source(row.uri, row.etag, row.offset, row.size)

    if not store.is_s3(rows[0].uri):
        found = dict(zip(order, map(read, order), strict=True))
    else:
        with ThreadPoolExecutor(THREADS) as pool:
            found = dict(zip(order, pool.map(read, order), strict=True))
    for i in range(len(rows)):
        yield found.pop(i)


def _runs(rows: Sequence[Planned]) -> Iterator[list[Planned]]:
    """Neighbours of one tar, close enough to be read together."""
    for _, group in groupby(rows, key=lambda row: row.uri):
        run: list[Planned] = []
        for row in group:
            if run and (
                not 0 <= row.offset - (run[-1].offset + run[-1].size) <= RUN_GAP
                or row.offset + row.size - run[0].offset > RUN_BYTES
            ):
                yield run
                run = []
            run.append(row)
        yield run


def _read_run(run: Sequence[Planned]) -> Iterator[bytes | ImageRejected]:
    first, last = run[0], run[-1]
    if first.size > MAX_FILE_BYTES:
        yield ImageRejected("bomb", f"{first.size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        return
    data = read_source(first.uri, first.etag, first.offset, last.offset + last.size - first.offset)
    for row in run:
        start = row.offset - first.offset
        yield data[start : start + row.size]
