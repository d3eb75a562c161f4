"""What a corpus is: WebDataset tars beside an immutable, versioned manifest. The read side of the manifest.

BASE/{shards/*.tar, current.json, manifests/DIGEST/{head.json, shards.parquet, samples/*.parquet, quarantine.parquet}}.
Tars that were adopted in place lie elsewhere: the column `uri` of shards.parquet says where.
The digest covers what the shards hold and how pages cut them, never where they lie or when they were made.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import store
from pipelines.corpus.accounts import account_place, read_account
from pipelines.corpus.errors import MAKE_AGAIN, ManifestError
from pipelines.corpus.head import Head, SourceVersion
from pipelines.corpus.layout import SCHEMA, Layout, digest_shards, read_layout
from pipelines.corpus.pages import Page, Pages
from pipelines.corpus.tables import read_table

if TYPE_CHECKING:
    import pyarrow as pa

    from pipelines.corpus.rows import OwnRows

__all__ = [
    "SCHEMA",
    "Corpus",
    "Head",
    "ManifestError",
    "Page",
    "Pages",
    "Shard",
    "SourceVersion",
    "corpus_base",
    "corpus_digest",
    "open_corpus",
]

CURRENT = "current"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
MIN_PREFIX = 12  # Hex digits of a digest that are enough to name a version.


@dataclass(frozen=True, slots=True)
class Shard:
    name: str
    split: str
    bytes: int
    samples: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """One immutable version of a corpus. Picklable: another process opens it again by its reference."""

    uri: str  # Base, without the version.
    head: Head
    account: str = ""  # Of which run the head says what was left out; "": of the one that wrote head.json.

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open_corpus, (self.reference, self.account)

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

    @property
    def manifest(self) -> str:
        return manifest_uri(self.uri, self.digest)

    @property
    def beside(self) -> str:
        """Where the tables lie that say what was left out."""
        return account_place(self.manifest, self.account)

    @cached_property
    def layout(self) -> Layout:
        """Where shards and pages lie; checked against the digest. All that training reads."""
        uri = store.join(self.manifest, "shards.parquet")
        return read_layout(uri, self.digest, self.class_names, self.splits, **self._digested())

    @cached_property
    def table(self) -> pa.Table:
        """shards.parquet as it is, checked against the digest; for tools."""
        uri = store.join(self.manifest, "shards.parquet")
        table = read_table(uri)
        found = corpus_digest(self.class_names, self.splits, table, **self._digested())
        if found != self.digest:
            raise ManifestError(
                f"{uri} is damaged: it belongs to digest {found[:12]}, not {self.digest[:12]}; {MAKE_AGAIN}"
            )
        return table

    def _digested(self) -> dict[str, Any]:
        return {
            "multi_label": self.head.multi_label,
            "label_maps": [source.labels for source in self.head.sources],
        }

    @cached_property
    def shards(self) -> list[Shard]:
        columns = [self.table[name].to_pylist() for name in ("name", "split", "bytes", "samples", "sha256")]
        return [Shard(*row) for row in zip(*columns, strict=True)]

    def shard_uri(self, shard: int) -> str:
        layout = self.layout
        place = layout.uri[shard].as_py() if layout.uri is not None else None
        place = place or f"shards/{layout.name[shard].as_py()}"
        return place if store.is_s3(place) or place.startswith("/") else store.join(self.uri, place)

    def pages(self, split: str) -> Pages:
        self._check_split(split)
        shards = self.layout.shards_of(list(self.splits).index(split))
        return Pages(self.layout, shards, self.first_sample(split))

    def first_sample(self, split: str) -> int:
        """Sample id of the split's first row."""
        self._check_split(split)
        names = list(self.splits)
        return sum(self.splits[name] for name in names[: names.index(split)])

    def samples(self, split: str) -> pa.Table:
        """The sample table of a split, in order of the sample ids. Read on demand; training never needs it."""
        from pipelines.corpus.rows import sample_rows

        self._check_split(split)
        return sample_rows(self, split)

    def source(self, number: int) -> Corpus:
        """One of the versions whose shards this one lists; opened once."""
        if number not in self._sources:
            source = self.head.sources[number]
            self._sources[number] = open_corpus(f"{source.uri or self.uri}@{source.digest}")
        return self._sources[number]

    @cached_property
    def _sources(self) -> dict[int, Corpus]:
        return {}

    @cached_property
    def own_rows(self) -> OwnRows:
        """The sample table of a version that lists no shards of others, by slices. Raises ManifestError."""
        from pipelines.corpus.rows import OwnRows

        return OwnRows(self)

    def quarantine(self) -> pa.Table:
        """Every image that was left out: key, source, reason, detail."""
        return read_table(store.join(self.beside, "quarantine.parquet"))

    def _check_split(self, split: str) -> None:
        if split not in self.splits:
            raise ManifestError(f"corpus {self.reference} has no split {split!r}; it has {', '.join(self.splits)}")


# Digests ------------------------------------------------------------------------------------------------------------


def corpus_digest(class_names: Sequence[str], splits: Mapping[str, int], table: pa.Table, **more: Any) -> str:
    """`layout.digest_shards` over a shard table in memory."""

    def chunks(names: Sequence[str]) -> list[pa.Table]:
        return [table.select(names)] if set(names) <= set(table.column_names) else []

    return digest_shards(class_names, splits, chunks, **more)


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


def open_corpus(reference: str, account: str = "") -> Corpus:
    """Open NAME@current, NAME@DIGEST (12 hex digits are enough), or the same with a URI or a folder for NAME.

    @current comes with the account of the run that made it current, a digest with the named one.
    """
    name, at, version = reference.rpartition("@")
    if not at or "/" in version:
        raise ManifestError(f"corpus {reference!r} names no version; write {reference}@current or {reference}@DIGEST")
    if version != CURRENT and not re.fullmatch(rf"[0-9a-f]{{{MIN_PREFIX},64}}", version):
        raise ManifestError(
            f"corpus version {version!r} is neither 'current' nor {MIN_PREFIX} to 64 hex digits of a digest"
        )
    base = corpus_base(name)
    if version == CURRENT:
        digest, account = _current(base, name)
    else:
        digest = _digest(base, name, version)
    uri = store.join(manifest_uri(base, digest), "head.json")
    try:
        value = store.read_json(uri)
    except store.NotFound:
        raise ManifestError(_unknown_version(base, name, version)) from None
    return Corpus(base, read_account(manifest_uri(base, digest), Head.from_json(value, uri), account), account)


def _current(base: str, name: str) -> tuple[str, str]:
    """The digest and the account that current.json names."""
    uri = store.join(base, "current.json")
    try:
        value = store.read_json(uri)
    except store.NotFound:
        raise ManifestError(_unknown_corpus(base, name)) from None
    digest = value.get("digest") if isinstance(value, dict) else None
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ManifestError(
            f"{uri} is damaged: it names no digest; delete it, and the command that made this corpus writes it anew"
        )
    return digest, str(value.get("account", ""))


def _digest(base: str, name: str, version: str) -> str:
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
