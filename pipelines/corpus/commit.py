"""The write side of the manifest: shard records in, one immutable corpus version out. head.json is the commit point."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines import store
from pipelines.corpus.errors import CorpusError, QuarantineError
from pipelines.corpus.manifest import Corpus, Head, corpus_digest, manifest_uri, read_table
from pipelines.corpus.quarantine import Rejected, count_reasons, quarantine_table

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["ShardRecord", "commit", "current_etag", "order_splits", "write_table"]

log = logging.getLogger(__name__)
PART_ROWS = 1_000_000  # Rows of one part of the sample table.


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """What one finished shard left behind; written after its tar and its rows."""

    number: int
    split: str
    name: str
    bytes: int
    samples: int
    sha256: str
    etag: str  # Of the tar in the store: a resumed run sees that it is still the one.
    page_offset: list[int]
    page_length: list[int]
    page_rows: list[int]
    rows: str  # Object with its sample rows, relative to the base.
    rejected: list[Rejected] = field(default_factory=list)
    noted: dict[str, int] = field(default_factory=dict)
    uri: str | None = None  # Where an adopted tar lies, relative to the base if below it; None: shards/NAME.

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardRecord:
        return cls(**dict(value) | {"rejected": [Rejected(**item) for item in value["rejected"]]})


def order_splits(names: Iterable[str]) -> list[str]:
    """train first, then val, then test, then others by name: the order of shards and sample ids."""
    known = ("train", "val", "test")
    return sorted(set(names), key=lambda name: (known.index(name) if name in known else len(known), name))


def write_table(uri: str, table: pa.Table) -> str:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return store.write(uri, sink.getvalue())


def shard_table(records: Sequence[ShardRecord]) -> pa.Table:
    import pyarrow as pa

    types = {
        "name": pa.string(),
        "split": pa.string(),
        "bytes": pa.int64(),
        "samples": pa.int32(),
        "sha256": pa.string(),
        "page_offset": pa.list_(pa.int64()),
        "page_length": pa.list_(pa.int64()),
        "page_rows": pa.list_(pa.int32()),
    }
    if any(record.uri is not None for record in records):
        types["uri"] = pa.string()
    return pa.table(
        {name: pa.array([getattr(record, name) for record in records], kind) for name, kind in types.items()}
    )


def current_etag(base: str) -> str | None:
    """The state of current.json, to be handed to `commit`: so a writer that came in between is noticed."""
    try:
        return store.stat(store.join(base, "current.json")).etag
    except store.NotFound:
        return None


def commit(
    base: str,
    records: Sequence[ShardRecord],
    *,
    class_names: Sequence[str],
    current: str | None,
    rejected: Sequence[Rejected] = (),
    ignored: Mapping[str, int] | None = None,
    parent: str | None = None,
    source: str = "",
    recipe: Mapping[str, Any] | None = None,
    tables: Mapping[str, pa.Table] | None = None,
) -> Corpus:
    """Write the manifest of these shards and make it the current version.

    `rejected` are images that never reached a shard; those that were found bad on the way are in the records.
    `current` is what `current_etag` said when the work began. `tables` are written beside the manifest as NAME.parquet.
    """
    everything_rejected = [*rejected, *(item for record in records for item in record.rejected)]
    # A shard of which nothing was left is no shard of the corpus.
    splits = order_splits(record.split for record in records if record.samples)
    records = sorted(
        (record for record in records if record.samples), key=lambda record: (splits.index(record.split), record.number)
    )
    samples = Counter[str]()
    for record in records:
        samples[record.split] += record.samples
    counts = {name: samples[name] for name in splits}
    table = shard_table(records)
    digest = corpus_digest(class_names, counts, table)
    target = manifest_uri(base, digest)

    if not records:
        raise QuarantineError(f"no image is left of {len(everything_rejected):,}: {count_reasons(everything_rejected)}")
    head_uri = store.join(target, "head.json")
    if store.exists(head_uri):  # The same corpus came out of another plan or place: a version is never written twice.
        head = Head.from_json(store.read_json(head_uri), head_uri)
        _make_current(base, digest, current)
        return Corpus(base, head)
    duplicates = _write_samples(base, target, records)
    write_table(store.join(target, "shards.parquet"), table)
    write_table(
        store.join(target, "quarantine.parquet"), quarantine_table(everything_rejected, dict(enumerate(class_names)))
    )
    for name, extra in (tables or {}).items():
        write_table(store.join(target, f"{name}.parquet"), extra)
    noted = Counter[str]()
    for record in records:
        noted.update(record.noted)
    head = Head(
        digest=digest,
        class_names=tuple(class_names),
        splits=counts,
        shards=len(records),
        bytes=sum(record.bytes for record in records),
        rejected=count_reasons(everything_rejected),
        noted=dict(sorted(noted.items())),
        ignored=dict(ignored or {}),
        duplicates=duplicates,
        parent=parent,
        source=source,
        recipe=dict(recipe or {}),
    )
    store.write_json(head_uri, head.to_json())
    _make_current(base, digest, current)
    return Corpus(base, head)


def _make_current(base: str, digest: str, current: str | None) -> None:
    uri = store.join(base, "current.json")
    condition: dict[str, Any] = {"if_absent": True} if current is None else {"if_match": current}
    try:
        store.write_json(uri, {"digest": digest}, **condition)
    except store.Conflict:
        found = store.read_json(uri)["digest"]
        if found != digest:
            raise CorpusError(
                f"{uri} was moved to {found[:12]} by another writer while this one wrote {digest[:12]}; that version is"
                f" whole and has the name {base}@{digest[:12]}; run the same command again to make it current"
            ) from None


def _write_samples(base: str, target: str, records: Sequence[ShardRecord]) -> dict[str, int]:
    """The sample table in parts, each named by its first sample id; returns how often content occurs again."""
    import pyarrow as pa

    first = 0
    contents: list[Any] = []
    for part in _parts(records):
        tables = []
        for shard, record in part:
            rows = read_table(store.join(base, record.rows))
            tables.append(rows.add_column(0, "shard", pa.array(np.full(rows.num_rows, shard, np.int32))))
        table = pa.concat_tables(tables)
        ids = np.arange(first, first + table.num_rows, dtype=np.int64)
        write_table(
            store.join(target, "samples", f"{first:012d}.parquet"), table.add_column(0, "sample_id", pa.array(ids))
        )
        splits = np.repeat([record.split for _, record in part], [record.samples for _, record in part])
        contents.append(pa.table({"content": table["content"], "label": table["label"], "split": splits.tolist()}))
        first += table.num_rows
    return _duplicates(pa.concat_tables(contents)) if contents else {}


def _duplicates(contents: pa.Table) -> dict[str, int]:
    """Images beyond the first of equal content; how many contents lie in several splits or several classes."""
    groups = contents.group_by("content").aggregate(
        [("label", "count"), ("label", "count_distinct"), ("split", "count_distinct")]
    )
    copies = groups["label_count"].to_numpy()
    found = {
        "images": int((copies - 1).sum()),
        "across_splits": int((groups["split_count_distinct"].to_numpy() > 1).sum()),
        "across_classes": int((groups["label_count_distinct"].to_numpy() > 1).sum()),
    }
    return {name: count for name, count in found.items() if count}


def _parts(records: Sequence[ShardRecord]) -> Iterator[list[tuple[int, ShardRecord]]]:
    part: list[tuple[int, ShardRecord]] = []
    rows = 0
    for shard, record in enumerate(records):
        if part and rows + record.samples > PART_ROWS:
            yield part
            part, rows = [], 0
        part.append((shard, record))
        rows += record.samples
    if part:
        yield part
