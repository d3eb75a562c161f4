"""The write side of the manifest: shard records in, one immutable corpus version out. head.json is the commit point."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity, store
from pipelines.corpus.errors import CorpusError, QuarantineError
from pipelines.corpus.head import Head, SourceVersion
from pipelines.corpus.layout import digest_shards
from pipelines.corpus.manifest import Corpus, manifest_uri
from pipelines.corpus.parts import RowCache, RowParts, write_table
from pipelines.corpus.quarantine import Rejected, bad_fraction, count_reasons, quarantine_table
from pipelines.corpus.records import Records, ShardRecord, order_splits, shard_pieces

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Description",
    "Records",
    "ShardRecord",
    "commit",
    "current_etag",
    "make_current",
    "one_writer",
    "order_splits",
    "write_manifest",
    "write_table",
]

PAGE_COLUMNS = ("page_offset", "page_length", "page_rows")


@dataclass(frozen=True, kw_only=True, slots=True)
class Description:
    """What a head says beside what follows from the shards."""

    class_names: tuple[str, ...]
    multi_label: bool = False
    noted: Mapping[str, int] = field(default_factory=dict)
    ignored: Mapping[str, int] = field(default_factory=dict)
    duplicates: Mapping[str, int] = field(default_factory=dict)
    parent: str | None = None
    sources: tuple[SourceVersion, ...] = ()
    source: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def one_writer(base: str) -> Iterator[Callable[[], None]]:
    """Hold the lease of a destination. Gives the check to be made before a commit. Raises CorpusError if it is held."""
    with ExitStack() as stack:
        try:
            held = stack.enter_context(identity.lease(store.join(base, "lease.json"), f"corpus {base}"))
        except identity.Held as error:
            raise CorpusError(
                f"{error}, which writes to it now; run the same command again when it has ended"
            ) from None
        yield held.check


def current_etag(base: str) -> str | None:
    """The state of current.json, to be handed to `commit`: so a writer that came in between is noticed."""
    try:
        return store.stat(store.join(base, "current.json")).etag
    except store.NotFound:
        return None


def commit(
    base: str,
    records: Records | Iterable[ShardRecord],
    *,
    class_names: Sequence[str],
    current: str | None,
    rejected: Sequence[Rejected] = (),
    ignored: Mapping[str, int] | None = None,
    parent: str | None = None,
    source: str = "",
    recipe: Mapping[str, Any] | None = None,
    tables: Mapping[str, pa.Table] | None = None,
    multi_label: bool = False,
    duplicates: Literal["keep", "quarantine"] = "keep",
    is_current: bool = True,
    rows: RowCache | None = None,
) -> Corpus:
    """Write the manifest of these shards and make it the current version.

    `rejected` are images that never reached a shard; those that were found bad on the way are in the records.
    `rows` has read some of the sample rows before. `current` is what `current_etag` said when the work began. `tables`
    are written beside the manifest as NAME.parquet.
    """
    records = records if isinstance(records, Records) else Records(records)
    _, shards = records.ordered()
    everything_rejected = [*rejected, *records.rejected]
    if not shards.num_rows:
        raise QuarantineError(f"no image is left of {len(everything_rejected):,}: {count_reasons(everything_rejected)}")
    parts = RowParts(base, shards, rows)
    equal = parts.duplicates()
    times: list[bytes | None] = [None if n == 1 else bytes([n]) for n in shards["times"].to_pylist()]
    if duplicates == "quarantine" and len(equal.extra):
        times = parts.times(equal.extra)
        everything_rejected += parts.rejected(equal)
    corpus = write_manifest(
        base,
        lambda names: shard_pieces(shards, times if any(times) else None, names),
        Description(
            class_names=tuple(class_names),
            multi_label=multi_label,
            noted=records.noted,
            ignored=ignored or {},
            duplicates=equal.counts,
            parent=parent,
            source=source,
            recipe=recipe or {},
        ),
        everything_rejected,
        write_more=lambda target: _write_beside(target, parts, tables or {}),
    )
    if is_current:
        make_current(base, corpus.digest, current)
    return corpus


def write_manifest(
    base: str,
    pieces: Callable[[Sequence[str] | None], Iterable[pa.Table]],
    described: Description,
    rejected: Sequence[Rejected],
    *,
    write_more: Callable[[str], None] = lambda target: None,
) -> Corpus:
    """A version without making it current.

    `pieces` gives its shard table in order, or the named columns of it and nothing where it lacks one; it is called
    several times. `write_more` writes what else stands beside the head, whose place it is told.
    """
    shards, size = 0, 0
    counts: Counter[str] = Counter()
    lying: Counter[str] = Counter()
    times = [value for piece in pieces(["times"]) for value in piece["times"].to_pylist()]
    for piece in pieces(["split", "samples", "bytes"]):
        size += int(piece["bytes"].to_numpy().sum())
        for split, samples in zip(piece["split"].to_pylist(), piece["samples"].to_pylist(), strict=True):
            own = times[shards] if times else None
            counts[split] += samples if own is None else sum(own) * (samples if len(own) == 1 else 1)
            lying[split] += samples
            shards += 1
    splits = {name: counts[name] for name in order_splits(lying)}
    maps = [source.labels for source in described.sources]
    digest = digest_shards(described.class_names, splits, pieces, multi_label=described.multi_label, label_maps=maps)
    target = manifest_uri(base, digest)
    head_uri = store.join(target, "head.json")
    if store.exists(head_uri):  # The same corpus came out of another plan or place: a version is never written twice.
        return Corpus(base, Head.from_json(store.read_json(head_uri), head_uri))
    write_more(target)
    _write_pieces(store.join(target, "shards.parquet"), pieces(None))
    names = dict(enumerate(described.class_names))
    write_table(store.join(target, "quarantine.parquet"), quarantine_table(rejected, names))
    head = Head(
        digest=digest,
        class_names=described.class_names,
        splits=splits,
        shards=shards,
        bytes=size,
        multi_label=described.multi_label,
        rejected=count_reasons(rejected),
        bad_fraction=bad_fraction(rejected, sum(lying.values())),
        noted=dict(sorted(described.noted.items())),
        ignored=dict(described.ignored),
        duplicates=dict(described.duplicates),
        parent=described.parent,
        sources=described.sources,
        source=described.source,
        recipe=dict(described.recipe),
    )
    store.write_json(head_uri, head.to_json())
    return Corpus(base, head)


def _write_pieces(uri: str, pieces: Iterable[pa.Table]) -> None:
    """A row group a piece, through a file: 300,000 shards are 100 MB."""
    import pyarrow.parquet as pq

    with tempfile.TemporaryDirectory(prefix="vit-manifest-") as folder:
        path = Path(folder) / "shards.parquet"
        writer: Any = None
        for piece in pieces:
            # Page columns never repeat: deltas are half the time of a dictionary, to write and to read.
            deltas = {f"{name}.list.element": "DELTA_BINARY_PACKED" for name in PAGE_COLUMNS}
            writer = writer or pq.ParquetWriter(
                path, piece.schema, compression="zstd", use_dictionary=["split"], column_encoding=deltas
            )
            writer.write_table(piece, row_group_size=max(piece.num_rows, 1))
        writer.close()
        store.upload(path, uri)


def _write_beside(target: str, rows: RowParts, tables: Mapping[str, pa.Table]) -> None:
    rows.write(target)
    for name, extra in tables.items():
        write_table(store.join(target, f"{name}.parquet"), extra)


def make_current(base: str, digest: str, current: str | None) -> None:
    """Move current.json. `current` is its state when the work began: another writer since then is an error."""
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
