"""A list of images as a source: CSV, Parquet or JSONL with `uri`, `label` or `labels`, and optionally `split`.

A relative uri is taken from where the list lies. The uri as written names the sample for ever.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines import store
from pipelines.corpus.entries import Entries
from pipelines.corpus.errors import SourceError
from pipelines.corpus.fetch import read_source
from pipelines.corpus.listing import SourceFile, local_etag
from pipelines.corpus.sources import SPLIT_NAMES

__all__ = ["is_list", "list_entries", "list_files_of"]

ENDINGS = (".csv", ".parquet", ".jsonl")
THREADS = 32  # Of a bucket every image is asked for its size and ETag.
SEPARATOR = ";"  # Between the labels of a CSV field.
Row = Mapping[str, Any]


def is_list(source: str) -> bool:
    return source.lower().endswith(ENDINGS) and (store.is_s3(source) or Path(source).expanduser().is_file())


def list_files_of(source: str) -> tuple[SourceFile, list[Row], list[SourceFile | str]]:
    """The list, its rows, and the image of each row: the file, or what is wrong with it. Raises SourceError."""
    listed = _listed(source)
    rows = list(_rows(listed))
    if not rows:
        raise SourceError(f"source {source} has no rows; it takes uri, label or labels, and split")
    base = listed.uri.rpartition("/")[0]
    with ThreadPoolExecutor(THREADS) as pool:
        files = list(pool.map(lambda row: _file(row, base), rows))
    return listed, rows, files


def _listed(source: str) -> SourceFile:
    if store.is_s3(source):
        info = store.stat(source)
        return SourceFile(source.rpartition("/")[2], source, info.size, info.etag)
    path = Path(source).expanduser().absolute()
    return SourceFile(path.name, str(path), path.stat().st_size, local_etag(path.stat()))


def _rows(listed: SourceFile) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = read_source(listed.uri, listed.etag)
    try:
        if listed.path.lower().endswith(".parquet"):
            columns = pq.read_table(pa.BufferReader(data)).to_pylist()
            yield from _checked(columns, listed)
        elif listed.path.lower().endswith(".csv"):
            yield from _checked(csv.DictReader(io.StringIO(data.decode("utf-8-sig"))), listed)
        else:
            yield from _checked((json.loads(line) for line in data.decode().splitlines() if line.strip()), listed)
    except (ValueError, RecursionError, pa.ArrowException, csv.Error) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"source {listed.uri} cannot be read ({error}); is it whole, and UTF-8?") from None


def _checked(rows: Any, listed: SourceFile) -> Iterator[Row]:
    columns: set[str] = set()
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("uri"), str) or not row["uri"].strip():
            raise SourceError(f"source {listed.uri}, row {number}: no `uri`; each row has uri, label or labels, split")
        columns |= row.keys()
        if {"label", "labels"} <= columns:
            raise SourceError(f"source {listed.uri}, row {number}: both `label` and `labels`; a list has one of them")
        yield row
    if columns and not columns & {"label", "labels"}:
        raise SourceError(
            f"source {listed.uri} has neither `label` nor `labels` (columns: {', '.join(sorted(columns))})"
        )


def _file(row: Row, base: str) -> SourceFile | str:
    written = row["uri"].strip()
    uri = written if store.is_s3(written) or written.startswith("/") else f"{base}/{written}"
    try:
        if store.is_s3(uri):
            info = store.stat(uri)
            return SourceFile(written, uri, info.size, info.etag)
        status = Path(uri).stat()
        return SourceFile(written, uri, status.st_size, local_etag(status))
    except (store.NotFound, OSError):
        return "no such file"
    except ValueError as error:  # A NUL in the name.
        return str(error)


def list_entries(rows: list[Row], files: list[SourceFile | str]) -> Entries:
    entries = Entries(multi_label=any("labels" in row for row in rows))
    for row, file in zip(rows, files, strict=True):
        path, split = row["uri"].strip(), _split(row)
        label = _labels(row.get("labels")) if entries.multi_label else _label(row.get("label"))
        if isinstance(file, str):
            entries.reject(path, split, "unreadable", file)
        elif label is None or label == ():
            entries.reject(path, split, "missing_label", "the row of the list has none")
        else:
            entries.add(path, file.uri, -1, file.size, file.etag, split, label)
    return entries


def _split(row: Row) -> str | None:
    given = str(row.get("split") or "").strip().lower()
    return SPLIT_NAMES.get(given, given) or None


def _label(value: Any) -> str | int | None:
    if isinstance(value, str):
        value = value.strip()
        return int(value) if value.isdecimal() else value or None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _labels(value: Any) -> tuple[str | int, ...]:
    """A list, or text with the labels between semicolons, without repeats."""
    items = value if isinstance(value, list) else str(value or "").split(SEPARATOR)
    found = (_label(item) for item in items)
    return tuple(dict.fromkeys(item for item in found if item is not None))
