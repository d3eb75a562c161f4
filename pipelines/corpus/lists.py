"""A list of images as a source: CSV, Parquet or JSONL with `uri`, `label` or `labels`, and optionally `split`.

A relative uri is taken from where the list lies. The uri as written names the sample for ever. Of a row only the
columns of `Entries` and `Files` are kept: a list may have many millions.
"""

from __future__ import annotations

import csv
import io
import json
import stat
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines import store
from pipelines.corpus.entries import Entries
from pipelines.corpus.errors import SourceError
from pipelines.corpus.fetch import read_listed
from pipelines.corpus.labels import Label, as_label, is_text
from pipelines.corpus.listing import Files, SourceFile, local_etag
from pipelines.corpus.ranged import RangedFile
from pipelines.corpus.sources import SPLIT_NAMES

__all__ = ["is_list", "read_list"]

ENDINGS = (".csv", ".parquet", ".jsonl")
COLUMNS = ("uri", "label", "labels", "split")
THREADS = 32  # Of a bucket every image is asked for its size and ETag.
TOGETHER = 4096  # Rows that are in memory as such.
BUFFER = 1 << 20
SEPARATOR = ";"  # Between the labels of a CSV field.
Row = Mapping[str, Any]


def is_list(source: str) -> bool:
    return source.lower().endswith(ENDINGS) and (store.is_s3(source) or Path(source).expanduser().is_file())


def read_list(source: str) -> tuple[Files, Entries]:
    """The list itself and every image of it that is there; and what its rows say. Raises SourceError."""
    listed = _listed(source)
    base = listed.uri.rpartition("/")[0]
    entries = Entries()
    spelled: dict[int, str] = {}

    def files() -> Iterator[SourceFile]:
        yield listed
        rows = _rows(listed)
        with ThreadPoolExecutor(THREADS) as pool:
            while some := list(islice(rows, TOGETHER)):
                found = pool.map(lambda row: _file(row, base), some)
                for row, file in zip(some, found, strict=True):
                    _enter(entries, row, file, spelled, source)
                    if isinstance(file, SourceFile):
                        yield file

    return Files(files()), entries


def _listed(source: str) -> SourceFile:
    if store.is_s3(source):
        info = store.stat(source)
        return SourceFile(source.rpartition("/")[2], source, info.size, info.etag)
    path = Path(source).expanduser().absolute()
    return SourceFile(path.name, str(path), path.stat().st_size, local_etag(path.stat()))


# Rows ---------------------------------------------------------------------------------------------------------------


def _rows(listed: SourceFile) -> Iterator[Row]:
    """Each with a `uri`, and all together with `label` or `labels`."""
    import pyarrow as pa

    kind = {".csv": _csv, ".parquet": _parquet, ".jsonl": _jsonl}[Path(listed.path.lower()).suffix]
    file = RangedFile(listed.size, partial(read_listed, listed.uri, listed.etag))
    columns: set[str] = set()
    number = 0
    try:
        for number, row in enumerate(kind(io.BufferedReader(file, BUFFER)), 1):
            if not isinstance(row, dict) or not isinstance(row.get("uri"), str) or not row["uri"].strip():
                raise SourceError(
                    f"source {listed.uri}, row {number}: no `uri`; each row has uri, label or labels, split"
                )
            if None in row:  # The csv module's name of fields beyond the header.
                raise SourceError(
                    f"source {listed.uri}, row {number} has more fields than the header; quote those with commas"
                )
            if not row.keys() <= columns:
                columns |= row.keys()
                _check_columns(listed, number, columns, all_known=kind is not _jsonl)
            yield row
    except (ValueError, RecursionError, pa.ArrowException, csv.Error) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"source {listed.uri} cannot be read ({error}); is it whole, and UTF-8?") from None
    if not number:
        raise SourceError(f"source {listed.uri} has no rows; it takes uri, label or labels, and split")
    _check_columns(listed, number, columns, all_known=True)


def _csv(file: io.BufferedReader) -> Iterator[Any]:
    """A quote that is not closed takes the rows after it into one field: a line break in a field tells."""
    reader = csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""), strict=True)
    for number, row in enumerate(reader, 1):
        if any(isinstance(field, str) and ("\n" in field or "\r" in field) for field in row.values()):
            raise ValueError(
                f"row {number} has a line break in a field: a quote above line {reader.line_num:,} is open"
            )
        yield row


def _jsonl(file: io.BufferedReader) -> Iterator[Any]:
    return (json.loads(line) for line in io.TextIOWrapper(file, "utf-8-sig") if line.strip())


def _parquet(file: io.BufferedReader) -> Iterator[Any]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(file) as table:
        wanted = [name for name in table.schema_arrow.names if name in COLUMNS]
        for batch in table.iter_batches(TOGETHER, columns=wanted):
            yield from batch.to_pylist()


def _check_columns(listed: SourceFile, number: int, columns: set[str], *, all_known: bool) -> None:
    if {"label", "labels"} <= columns:
        raise SourceError(f"source {listed.uri}, row {number}: both `label` and `labels`; a list has one of them")
    if all_known and not columns & {"label", "labels"}:
        raise SourceError(
            f"source {listed.uri} has neither `label` nor `labels` (columns: {', '.join(sorted(columns))})"
        )


# What a row says ----------------------------------------------------------------------------------------------------


def _file(row: Row, base: str) -> SourceFile | str:
    """The image of a row, or what is wrong with it."""
    written = row["uri"].strip()
    uri = written if store.is_s3(written) or written.startswith("/") else f"{base}/{written}"
    try:
        if store.is_s3(uri):
            info = store.stat(uri)
            return SourceFile(written, uri, info.size, info.etag)
        status = Path(uri).stat()
        if not stat.S_ISREG(status.st_mode):
            return "a folder, a pipe or a device"
        return SourceFile(written, uri, status.st_size, local_etag(status))
    except (store.NotFound, OSError):
        return "no such file"
    except ValueError as error:  # A NUL in the name.
        return str(error)


def _enter(entries: Entries, row: Row, file: SourceFile | str, spelled: dict[int, str], source: str) -> None:
    """The sample of a row, or why there is none."""
    path, split = row["uri"].strip(), _split(row)
    if "labels" in row:
        entries.multi_label = True  # Rows before it had no label at all.
    label, problem = _labels(row.get("labels")) if entries.multi_label else _label(row.get("label"))
    if not is_text(path):
        entries.reject(path.encode("utf-8", "backslashreplace").decode(), split, "bad_name", "the uri is not UTF-8")
    elif isinstance(file, str):
        entries.reject(path, split, "unreadable", file)
    elif label is None:
        entries.reject(path, split, "missing_label", problem)
    else:
        text = row.get("label")
        if isinstance(label, int) and isinstance(text, str):
            first = spelled.setdefault(label, text.strip())
            if first != text.strip():
                raise SourceError(
                    f"source {source} has labels {first!r} and {text.strip()!r}, which are one class number; write it"
                    " one way, or put a letter before it if they are names"
                )
        entries.add(path, file.uri, -1, file.size, file.etag, split, label)


def _split(row: Row) -> str | None:
    given = str(row.get("split") or "").strip().lower()
    return SPLIT_NAMES.get(given, given) or None


def _label(value: Any) -> tuple[Label | None, str]:
    """The label, or None and what is wrong."""
    value = value.strip() if isinstance(value, str) else value
    if value is None or value == "" or value != value:  # NaN, which pandas writes for a gap.
        return None, "the row of the list has none"
    label = as_label(value)
    if label is not None:
        return label, ""
    hint = "; several labels stand in a column `labels`" if isinstance(value, list) else ""
    return None, f"{repr(value)[:60]} is neither a class name nor a class number, which count from 0{hint}"


def _labels(value: Any) -> tuple[Label | None, str]:
    """Of a list, or of text with the labels between semicolons; without repeats."""
    items = value.split(SEPARATOR) if isinstance(value, str) else value
    if not isinstance(items, list):
        return _label(value) if value is None else (None, f"{repr(value)[:60]} is no list of labels")
    given = [item for item in items if not isinstance(item, str) or item.strip()]
    found = [_label(item) for item in given]
    if problem := next((problem for label, problem in found if label is None), ""):
        return None, problem
    labels = tuple(dict.fromkeys(label for label, _ in found if label is not None and not isinstance(label, tuple)))
    return labels or None, "the row of the list has none"
