"""What a corpus is: WebDataset tars beside an immutable, versioned manifest. The read side of the manifest.

BASE/{shards/*.tar, current.json, manifests/DIGEST/{head.json, shards.parquet, samples/*.parquet, quarantine.parquet}}.
Tars that were adopted in place lie elsewhere: the column `uri` of shards.parquet says where.
The digest covers what the shards hold and how pages cut them, never where they lie or when they were made.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines import store
from pipelines.corpus.errors import ManifestError
from pipelines.identity import canonical

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["SCHEMA", "Corpus", "Head", "ManifestError", "Pages", "Shard", "corpus_base", "corpus_digest", "open_corpus"]

SCHEMA = 1
CURRENT = "current"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MIN_PREFIX = 12  # Hex digits of a digest that are enough to name a version.


@dataclass(frozen=True, slots=True)
class Head:
    """The small part of a manifest: enough to plan a run and to show what a corpus is."""

    digest: str
    class_names: tuple[str, ...]
    splits: dict[str, int]  # Samples per split, in manifest order.
    shards: int
    bytes: int  # Of all tars.
    rejected: dict[str, int] = field(
        default_factory=dict
    )  # Quarantined images by reason; quarantine.parquet lists them.
    noted: dict[str, int] = field(default_factory=dict)  # Kept, but converted by rule when read: alpha, cmyk, ...
    ignored: dict[str, int] = field(default_factory=dict)  # Files of the source that are no samples, by kind.
    duplicates: dict[str, int] = field(default_factory=dict)  # Images whose content occurs before, by where it does.
    parent: str | None = None  # Digest of the version that this one grew from.
    source: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def samples(self) -> int:
        return sum(self.splits.values())

    def to_json(self) -> dict[str, Any]:
        # A list, because JSON objects carry no order and the order of the splits is that of the sample ids.
        return dataclasses.asdict(self) | {"splits": [[name, samples] for name, samples in self.splits.items()]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> Head:
        schema = value.get("schema")
        if schema != SCHEMA:
            raise ManifestError(
                f"{where}: manifest schema {schema!r}, this code reads {SCHEMA}; use the release that wrote it"
            )
        known = {spec.name for spec in dataclasses.fields(cls)}
        if unknown := value.keys() - known:
            raise ManifestError(f"{where}: unknown keys {sorted(unknown)}; the head was not written by this code")
        return cls(
            **dict(value)
            | {"class_names": tuple(value["class_names"]), "splits": {name: int(n) for name, n in value["splits"]}}
        )


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    split: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Pages:
    """One entry a page, in manifest order. A page is a run of consecutive samples of one shard: the unit of reading."""

    shard: np.ndarray[Any, np.dtype[np.int32]]  # Number of the shard in the manifest.
    offset: np.ndarray[Any, np.dtype[np.int64]]  # Bytes from the start of the tar to the page's first header.
    length: np.ndarray[Any, np.dtype[np.int64]]  # Bytes.
    rows: np.ndarray[Any, np.dtype[np.int32]]
    first_row: np.ndarray[Any, np.dtype[np.int64]]  # Sample id of the page's first row.

    def __len__(self) -> int:
        return len(self.shard)


@dataclass(frozen=True)
class Corpus:
    """One immutable version of a corpus. Picklable: another process opens it again by its reference."""

    uri: str  # Base, without the version.
    head: Head

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return open_corpus, (self.reference,)

    @property
    def digest(self) -> str:
        return self.head.digest

    @property
    def reference(self) -> str:
        return f"{self.uri}@{self.digest}"

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.head.class_names

    @property
    def splits(self) -> dict[str, int]:
        return self.head.splits

    @cached_property
    def table(self) -> pa.Table:
        """shards.parquet, checked against the digest."""
        uri = store.join(manifest_uri(self.uri, self.digest), "shards.parquet")
        table = read_table(uri)
        found = corpus_digest(self.class_names, self.splits, table)
        if found != self.digest:
            raise ManifestError(
                f"{uri} is damaged: it belongs to digest {found[:12]}, not {self.digest[:12]}; shard again"
            )
        return table

    @cached_property
    def shards(self) -> list[Shard]:
        columns = [self.table[name].to_pylist() for name in ("name", "split", "bytes", "samples", "sha256")]
        return [Shard(*row) for row in zip(*columns, strict=True)]

    @cached_property
    def _places(self) -> list[str]:
        """Of each shard: its URI, or its path below the base."""
        names = [f"shards/{name}" for name in self.table["name"].to_pylist()]
        if "uri" not in self.table.column_names:
            return names
        return [uri or name for uri, name in zip(self.table["uri"].to_pylist(), names, strict=True)]

    def shard_uri(self, shard: int) -> str:
        place = self._places[shard]
        return place if store.is_s3(place) or place.startswith("/") else store.join(self.uri, place)

    def pages(self, split: str) -> Pages:
        self._check_split(split)
        counts, offset, length, rows = page_arrays(self.table)
        starts = np.cumsum(rows, dtype=np.int64) - rows
        shard = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        chosen = np.isin(shard, np.flatnonzero(np.asarray(self.table["split"].to_pylist(), dtype=object) == split))
        return Pages(shard[chosen], offset[chosen], length[chosen], rows[chosen].astype(np.int32), starts[chosen])

    def first_sample(self, split: str) -> int:
        """Sample id of the split's first row."""
        self._check_split(split)
        names = list(self.splits)
        return sum(self.splits[name] for name in names[: names.index(split)])

    def samples(self, split: str) -> pa.Table:
        """The sample table of a split, in order of the sample ids. Read on demand; training never needs it."""
        import pyarrow as pa

        low = self.first_sample(split)
        high = low + self.splits[split]
        folder = store.join(manifest_uri(self.uri, self.digest), "samples")
        uris = [info.uri for info in store.list_objects(folder) if info.uri.endswith(".parquet")]
        firsts = [int(Path(uri).stem) for uri in uris]
        lasts = [*firsts[1:], self.head.samples]
        tables = []
        for uri, first, last in zip(uris, firsts, lasts, strict=True):
            if first < high and last > low:
                part = read_table(uri)
                tables.append(part.slice(max(low - first, 0), min(high, last) - max(low, first)))
        table = pa.concat_tables(tables)
        if table.num_rows != high - low:
            raise ManifestError(
                f"{folder}: {table.num_rows:,} rows for {high - low:,} samples of {split!r}; shard again"
            )
        return table

    def quarantine(self) -> pa.Table:
        """Every image that was left out: key, source, reason, detail."""
        return read_table(store.join(manifest_uri(self.uri, self.digest), "quarantine.parquet"))

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ManifestError(f"corpus {self.reference} has no split {split!r}; it has {', '.join(self.splits)}")


# Tables and digests -------------------------------------------------------------------------------------------------


def read_table(uri: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(pa.BufferReader(store.read(uri)))
    except store.NotFound:
        raise ManifestError(f"{uri} is missing; shard again, the corpus is incomplete") from None
    except pa.ArrowInvalid as error:
        raise ManifestError(f"{uri} is damaged ({error}); shard again") from None


def page_arrays(table: pa.Table) -> tuple[np.ndarray[Any, Any], ...]:
    """Pages per shard, then offset, length and rows of every page, laid end to end."""
    import pyarrow.compute as pc

    counts = pc.list_value_length(table["page_rows"]).to_numpy()
    columns = (pc.list_flatten(table[f"page_{name}"]).to_numpy() for name in ("offset", "length", "rows"))
    return (counts.astype(np.int64), *(column.astype(np.int64) for column in columns))


def corpus_digest(class_names: Sequence[str], splits: Mapping[str, int], table: pa.Table) -> str:
    """sha256 over classes, splits, and each shard's sha256, split, rows and page table, in manifest order."""
    head = {"schema": SCHEMA, "classes": list(class_names), "splits": [[name, n] for name, n in splits.items()]}
    total = hashlib.sha256(canonical(head).encode())
    columns = [table[name].to_pylist() for name in ("sha256", "split", "samples")]
    for sha256, split, samples in zip(*columns, strict=True):
        total.update(f"\n{sha256} {split} {samples}".encode())
    for array in page_arrays(table):
        total.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
    return total.hexdigest()


# References ---------------------------------------------------------------------------------------------------------


def manifest_uri(base: str, digest: str) -> str:
    return store.join(base, "manifests", digest)


def corpus_base(name_or_uri: str) -> str:
    """A corpus name stands for ROOT/corpora/NAME; a URI or a path (anything with a slash) for itself."""
    if store.is_s3(name_or_uri):
        return name_or_uri.rstrip("/")
    if "/" in name_or_uri:
        return Path(name_or_uri).expanduser().absolute().as_posix()
    if not NAME.fullmatch(name_or_uri):
        raise ManifestError(
            f"corpus name {name_or_uri!r} is not letters, digits, '.', '_', '-'; a path has a slash, as in ./corpus"
        )
    return store.join(store.root(), "corpora", name_or_uri)


def open_corpus(reference: str) -> Corpus:
    """Open NAME@current, NAME@DIGEST (12 hex digits are enough), or the same with a URI or a folder for NAME."""
    name, at, version = reference.rpartition("@")
    if not at or "/" in version:
        raise ManifestError(f"corpus {reference!r} names no version; write {reference}@current or {reference}@DIGEST")
    if version != CURRENT and not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},64}}", version):
        raise ManifestError(
            f"corpus version {version!r} is neither 'current' nor {MIN_PREFIX} to 64 hex digits of a digest"
        )
    base = corpus_base(name)
    digest = _digest(base, name, version)
    uri = store.join(manifest_uri(base, digest), "head.json")
    try:
        value = store.read_json(uri)
    except store.NotFound:
        raise ManifestError(_unknown_version(base, name, version)) from None
    return Corpus(base, Head.from_json(value, uri))


def _digest(base: str, name: str, version: str) -> str:
    if version == CURRENT:
        try:
            return str(store.read_json(store.join(base, "current.json"))["digest"])
        except store.NotFound:
            raise ManifestError(_unknown_corpus(base, name)) from None
    if len(version) == 64:
        return version
    found = [digest for digest in _versions(base) if digest.startswith(version)]
    if len(found) > 1:
        raise ManifestError(
            f"version {version!r} of corpus {name!r} is ambiguous: {', '.join(found)}; give more digits"
        )
    if not found:
        raise ManifestError(_unknown_version(base, name, version))
    return found[0]


def _versions(base: str) -> list[str]:
    manifests = store.list_objects(store.join(base, "manifests"))
    return [info.uri.split("/")[-2] for info in manifests if info.uri.endswith("/head.json")]


def _unknown_version(base: str, name: str, version: str) -> str:
    versions = _versions(base)
    if not versions:
        return _unknown_corpus(base, name)
    shown = ", ".join(digest[:MIN_PREFIX] for digest in versions[:5])
    return f"corpus {name!r} has no version {version!r}; it has {shown}; the newest is {name}@current"


def _unknown_corpus(base: str, name: str) -> str:
    import difflib

    folder, _, wanted = base.rpartition("/")
    names = sorted(_corpora(folder))
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or names[:5]
    hint = f"; nearest: {', '.join(near)}" if near else f"; there is none in {folder}"
    return f"no corpus {name!r} (no {base}/current.json){hint}; `vit shard RECIPE` makes one"


def _corpora(folder: str) -> Iterator[str]:
    """Names of the corpora in a folder or prefix, without listing what is in them."""
    if not store.is_s3(folder):
        yield from (path.parent.name for path in Path(folder).glob("*/current.json"))
        return
    bucket, _, key = folder.removeprefix("s3://").partition("/")
    pages = (
        store.client()
        .get_paginator("list_objects_v2")
        .paginate(Bucket=bucket, Prefix=f"{key}/" if key else "", Delimiter="/")
    )
    for page in pages:
        for item in page.get("CommonPrefixes", ()):
            name = item["Prefix"].rstrip("/").rpartition("/")[2]
            if store.exists(store.join(folder, name, "current.json")):
                yield name
