"""Tars that others wrote become a corpus where they lie: listed, scanned one by one, named. No byte is copied.

BASE/scans/VALIDATE-vN/ID.{json,parquet,keys} keeps what each tar holds, named by its path, size and ETag: when tars are
added, or the run was killed, the others are not read again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines import store
from pipelines.corpus.adopt import scan_tar
from pipelines.corpus.anomalies import ANOMALIES, Anomaly
from pipelines.corpus.commit import Records, ShardRecord, order_splits
from pipelines.corpus.errors import SourceError
from pipelines.corpus.fetch import read_listed
from pipelines.corpus.labels import MAX_CLASSES
from pipelines.corpus.listing import PACKED, SourceFile, check_names, list_files, listing_digest, packed_hint
from pipelines.corpus.manifest import Corpus, manifest_uri, open_corpus
from pipelines.corpus.scanned import ScannedTar
from pipelines.corpus.sources import SPLIT_NAMES, split_from_name
from pipelines.corpus.tables import read_table, write_table
from pipelines.corpus.tar import sample_key

__all__ = [
    "SCAN_VERSION",
    "TarListing",
    "count_anomalies",
    "list_tars",
    "name_labels",
    "point_to",
    "scan_id",
    "scan_one",
    "shard_records",
    "shared_keys",
    "split_of",
]

SCAN_VERSION = 3  # Raised when the same tar would give another record.
OURS = (
    "manifests/",
    "scans/",
    "plans/",
    "rows/",
    "current.json",
    "lease.json",
)  # What stands beside tars that were indexed.
THREADS = 16
SHOWN_KEYS = 20


@dataclass(frozen=True, slots=True)
class TarListing:
    source: str
    base: str  # The folder or prefix in which the tars lie.
    tars: list[SourceFile]
    ignored: dict[str, int]

    @property
    def digest(self) -> str:
        return listing_digest("index", self.tars)

    @property
    def covered(self) -> str:
        """The folder or prefix of which every tar is listed; of a single tar that was named, its own URI."""
        named = self.source if store.is_s3(self.source) else str(Path(self.source).expanduser().absolute())
        return named if named == self.tars[0].uri else self.base


def list_tars(source: str) -> TarListing:
    """Every .tar below a folder or prefix, or one tar. Raises SourceError."""
    files, ignored = list_files(source)
    tars = [file for file in files if file.path.endswith(".tar")]
    others = [file for file in files if not file.path.endswith(".tar") and not file.path.startswith(OURS)]
    packed = [file for file in others if file.path.endswith(PACKED)]
    if not tars:
        hint = (
            f"; {packed_hint(packed[0].path)}"
            if packed
            else f"; it holds {len(files):,} other files such as {files[0].path}; `vit shard` takes class folders"
        )
        raise SourceError(f"source {source} holds no .tar{hint}")
    check_names(tars)
    kinds = {"compressed_tar": len(packed), "other": len(others) - len(packed)}
    base = tars[0].uri.removesuffix(tars[0].path).rstrip("/") or "/"
    return TarListing(source, base, tars, ignored | {kind: count for kind, count in kinds.items() if count})


def split_of(path: str, default: str) -> str:
    """The split of a tar: a folder named as one, else its file name, else the default."""
    *folders, name = path.split("/")
    for folder in folders:
        if folder.lower() in SPLIT_NAMES:
            return SPLIT_NAMES[folder.lower()]
    return split_from_name(name) or default


# One tar ------------------------------------------------------------------------------------------------------------


def scan_one(item: Mapping[str, Any], scans: str, decode: bool, keep: bool) -> dict[str, Any]:
    """Scan the tar of `item` (a SourceFile and its split), or take over its record. Returns {scan, reused}."""
    place = store.join(scans, scan_id(item))
    if keep:
        try:
            record = ScannedTar.from_json(store.read_json(f"{place}.json"))
            if all(store.exists(f"{place}.{end}") for end in ("parquet", "keys")):
                return {"place": place, "scan": record.to_json(), "reused": True}
        except store.NotFound:
            pass
    read = partial(_read, item["uri"], item["etag"])
    record, rows = scan_tar(item["path"], item["size"], read, split=item["split"], decode=decode)
    write_table(f"{place}.parquet", rows)
    store.write(f"{place}.keys", _key_hashes(rows["key"].to_pylist()).tobytes())
    store.write_json(f"{place}.json", record.to_json())
    return {"place": place, "scan": record.to_json(), "reused": False}


def scan_id(item: Mapping[str, Any]) -> str:
    """Names what a scan found in a tar of this path, size, ETag and split."""
    named = "\0".join(str(item[name]) for name in ("path", "size", "etag", "split"))
    return hashlib.sha256(named.encode("utf-8", "surrogateescape")).hexdigest()[:24]


def _read(uri: str, etag: str, start: int, length: int) -> bytes:
    data = read_listed(uri, etag, start, length)
    if len(data) != length:
        raise SourceError(f"{uri} became shorter while it was read; run the same command again to list anew")
    return data


def _key_hashes(keys: Iterable[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return np.array([int(sample_key(key), 16) for key in keys], "<u8")


# All of them --------------------------------------------------------------------------------------------------------


def name_labels(
    scans: Sequence[ScannedTar], tars: Sequence[SourceFile], classes: Sequence[str] | None, source: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Class names in order of the label; and where labels are names, the class number of each."""
    numbers = [number for scan in scans for number in scan.numbers]
    names = sorted({name for scan in scans for name in scan.names})
    if numbers and names:
        number = next(tar.path for tar, scan in zip(tars, scans, strict=True) if scan.numbers)
        name = next(tar.path for tar, scan in zip(tars, scans, strict=True) if scan.names)
        raise SourceError(
            f"source {source} mixes class numbers (in {number}) and class names (such as {names[0]!r} in {name});"
            " use one of them in every label"
        )
    if names:
        class_names = tuple(classes) if classes is not None else tuple(names)
        place = {name: number for number, name in enumerate(class_names)}
        if unknown := [name for name in names if name not in place]:
            raise SourceError(f"source {source} has class {unknown[0]!r}, which is not in `classes`; add it there")
        return _at_least_two(class_names, source), place
    high = max(numbers, default=-1)
    if high >= MAX_CLASSES:
        tar = next(tar.path for tar, scan in zip(tars, scans, strict=True) if high in scan.numbers)
        raise SourceError(
            f"source {source} has label {high} (in {tar}); class numbers count from 0, up to {MAX_CLASSES - 1:,}"
        )
    class_names = tuple(classes) if classes is not None else tuple(str(number) for number in range(high + 1))
    if high >= len(class_names):
        raise SourceError(f"source {source} has label {high}, `classes` names {len(class_names)}; name every class")
    return _at_least_two(class_names, source), {}


def _at_least_two(names: tuple[str, ...], source: str) -> tuple[str, ...]:
    if names and len(names) < 2:
        raise SourceError(f"source {source} has one class only ({names[0]}); a classifier needs two or more")
    return names


def shard_records(
    listing: TarListing,
    base: str,
    splits: Sequence[str],
    places: Sequence[str],
    scans: Sequence[ScannedTar],
    class_numbers: Mapping[str, int],
) -> Iterator[ShardRecord]:
    """What `commit` takes, in the order of the manifest: by split, then by path."""
    names = order_splits(splits)
    lists = any(scan.multi_label for scan in scans)
    order = sorted(range(len(scans)), key=lambda number: (names.index(splits[number]), listing.tars[number].path))

    def record(number: int) -> ShardRecord:
        tar, scan = listing.tars[order[number]], scans[order[number]]
        place = places[order[number]]
        change = {own: class_numbers[name] for own, name in enumerate(scan.names)}
        if all(own == new for own, new in change.items()):
            change = {}
        return ShardRecord(
            number=number,
            split=splits[order[number]],
            name=tar.path,
            bytes=scan.bytes,
            samples=scan.samples,
            sha256=scan.sha256,
            etag=tar.etag,
            page_offset=list(scan.page_offset),
            page_length=list(scan.page_length),
            page_rows=list(scan.page_rows),
            rows=_below(_relabelled(place, change, lists and not scan.multi_label), base),
            rejected=scan.rejected,
            noted=scan.noted,
            uri=_below(tar.uri, base),
        )

    with ThreadPoolExecutor(THREADS) as pool:
        for first in range(0, len(order), 64 * THREADS):  # So many lie unpacked in memory.
            yield from pool.map(record, range(first, min(first + 64 * THREADS, len(order))))


def _below(uri: str, base: str) -> str:
    """Relative to the base where it lies below it, so that a folder can be moved with its tars."""
    return uri.removeprefix(base.rstrip("/") + "/")


def _relabelled(place: str, change: Mapping[int, int], as_lists: bool) -> str:
    """The rows of a tar with the corpus' class numbers, and with lists of them where other tars have lists."""
    if not change and not as_lists:
        return f"{place}.parquet"
    import pyarrow as pa

    mark = hashlib.sha256(repr((sorted(change.items()), as_lists)).encode()).hexdigest()[:12]
    uri = f"{place}-{mark}.parquet"
    if not store.exists(uri):
        table = read_table(f"{place}.parquet")
        name = "labels" if "labels" in table.column_names else "label"
        given = [one if isinstance(one, list) else [one] for one in table[name].to_pylist()]
        found = [sorted(change.get(own, own) for own in labels) for labels in given]
        at = table.schema.get_field_index(name)
        if name == "labels" or as_lists:
            table = table.set_column(at, "labels", pa.array(found, pa.list_(pa.int32())))
        else:
            table = table.set_column(at, "label", pa.array([own for (own,) in found], pa.int32()))
        write_table(uri, table)
    return uri


def point_to(corpus: Corpus, records: Records) -> Corpus:
    """The same tars may have been indexed before in another place: the version is the same, its URIs are not."""
    uris: dict[str, list[str | None]] = {}
    _, shards = records.ordered()
    for sha256, uri in zip(shards["sha256"].to_pylist(), shards["uri"].to_pylist(), strict=True):
        uris.setdefault(sha256, []).append(uri)  # Two tars of the same bytes come in one order.
    wanted = [uris[sha256].pop(0) for sha256 in corpus.table["sha256"].to_pylist()]
    columns = corpus.table.column_names
    if "uri" in columns and corpus.table["uri"].to_pylist() == wanted:
        return corpus
    import pyarrow as pa

    table = corpus.table.drop_columns(["uri"]) if "uri" in columns else corpus.table
    write_table(
        store.join(manifest_uri(corpus.uri, corpus.digest), "shards.parquet"),
        table.append_column("uri", pa.array(wanted, pa.string())),
    )
    return open_corpus(corpus.reference, corpus.account)


def shared_keys(tars: Sequence[SourceFile], places: Sequence[str]) -> tuple[int, list[Anomaly]]:
    """Keys that samples of several tars have: how many, and the first of them. 8 bytes a sample are held."""
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = [np.frombuffer(data, "<u8") for data in pool.map(lambda place: store.read(f"{place}.keys"), places)]
    every, counts = np.unique(np.concatenate([np.empty(0, "<u8"), *hashes]), return_counts=True)
    shared = every[counts > 1]
    wanted = shared[:SHOWN_KEYS]
    found: dict[str, list[str]] = {}
    for tar, place, own in zip(tars, places, hashes, strict=True):
        rows = np.flatnonzero(np.isin(own, wanted))
        if len(rows):
            keys = read_table(f"{place}.parquet")["key"]
            for row in rows.tolist():
                found.setdefault(keys[row].as_py(), []).append(tar.path)
    return len(shared), [
        Anomaly("shared_key", paths[0], -1, key, f"in {len(paths)} tars: {', '.join(paths[:5])}")
        for key, paths in sorted(found.items())
    ]


def count_anomalies(scans: Iterable[ScannedTar], shared: int) -> dict[str, int]:
    counts = Counter[str]()
    for scan in scans:
        counts.update(scan.anomaly_counts)
    if shared:
        counts["shared_key"] = shared
    return {kind: counts[kind] for kind in ANOMALIES if counts[kind]}
