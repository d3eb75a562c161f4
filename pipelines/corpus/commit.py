"""The write side of the manifest: shard records in, one immutable corpus version out. head.json is the commit point."""

from __future__ import annotations

import logging
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipelines import identity, store
from pipelines.corpus.accounts import write_account
from pipelines.corpus.errors import CorpusError, ManifestError, QuarantineError
from pipelines.corpus.head import Head, SourceVersion
from pipelines.corpus.layout import digest_shards
from pipelines.corpus.manifest import Corpus, manifest_uri
from pipelines.corpus.parts import RowCache, RowParts
from pipelines.corpus.quarantine import Rejected, bad_fraction, count_reasons, quarantine_table
from pipelines.corpus.records import Records, ShardRecord, order_splits, shard_pieces
from pipelines.corpus.tables import write_table
from pipelines.corpus.whole import lost_piece
from pipelines.identity import StageResult
from pipelines.progress import say

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
    "point_to_finished",
    "write_manifest",
]

log = logging.getLogger(__name__)
WRITTEN = ("shards", "plans", "manifests")  # Below the base; beside adopted tars other folders are not ours.
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
        for folder in WRITTEN:
            store.remove_leftovers(store.join(base, folder))
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
    often: list[int] = shards["times"].to_pylist()
    times = [None if n == 1 else bytes([n]) for n in often]
    if duplicates == "quarantine" and len(equal.extra):
        times = parts.times(equal.extra, often)
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
        rows=parts,
        tables=tables or {},
    )
    if is_current:
        make_current(base, corpus.digest, current, corpus.account)
    return corpus


def write_manifest(
    base: str,
    pieces: Callable[[Sequence[str] | None], Iterable[pa.Table]],
    described: Description,
    rejected: Sequence[Rejected] | None,
    *,
    rows: RowParts | None = None,
    tables: Mapping[str, pa.Table] | None = None,
) -> Corpus:
    """A version without making it current.

    `pieces` gives its shard table in order, or the named columns of it and nothing where it lacks one; it is called
    several times. `rejected`: None for a version that is made of other versions and looks at no source. `rows`: its
    sample table, if it has one of its own. `tables` come beside the quarantine as NAME.parquet.
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
    names = dict(enumerate(described.class_names))
    beside = {**(tables or {}), "quarantine": quarantine_table(rejected or [], names)}
    head = Head(
        digest=digest,
        class_names=described.class_names,
        splits=splits,
        shards=shards,
        bytes=size,
        multi_label=described.multi_label,
        rejected=count_reasons(rejected or []),
        bad_fraction=bad_fraction(rejected or [], sum(lying.values())),
        noted=dict(sorted(described.noted.items())),
        ignored=dict(described.ignored),
        duplicates=dict(described.duplicates),
        parent=described.parent,
        sources=described.sources,
        source=described.source,
        recipe=dict(described.recipe),
    )
    standing = _standing(base, digest)
    if standing is not None:  # The same corpus came out of another plan or place: a version is never written twice.
        if rejected is None:
            return standing
        if rows is not None and not standing.head.sources:
            rows.write(target, mend=True)
        return Corpus(base, *write_account(target, standing.head, head, beside))
    if rows is not None:
        rows.write(target)
    _write_pieces(store.join(target, "shards.parquet"), pieces(None))
    for name, table in beside.items():
        write_table(store.join(target, f"{name}.parquet"), table)
    store.write_json(store.join(target, "head.json"), head.to_json())
    return Corpus(base, head)


def _standing(base: str, digest: str) -> Corpus | None:
    """The version if it stands; None if there is none, or if a piece of its manifest is lost or damaged."""
    uri = store.join(manifest_uri(base, digest), "head.json")
    if not store.exists(uri):
        return None
    try:
        corpus = Corpus(base, Head.from_json(store.read_json(uri), uri))
        problem = lost_piece(corpus)
    except ManifestError as error:
        problem = str(error)
    if problem is None:
        return corpus
    log.warning("%s; the manifest is written anew", problem)
    return None


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


def make_current(base: str, digest: str, current: str | None, account: str = "") -> None:
    """Move current.json. `current` is its state when the work began: another writer since then is an error."""
    uri = store.join(base, "current.json")
    condition: dict[str, Any] = {"if_absent": True} if current is None else {"if_match": current}
    try:
        store.write_json(uri, _pointer(digest, account), **condition)
    except store.Conflict:
        found = store.read_json(uri)["digest"]
        if found != digest:
            raise CorpusError(
                f"{uri} was moved to {found[:12]} by another writer while this one wrote {digest[:12]}; that version is"
                f" whole and has the name {base}@{digest[:12]}; run the same command again to make it current"
            ) from None


def point_to_finished(result: StageResult, etag: str | None) -> StageResult:
    """NAME@current is what the last command asked for, also where that was finished long ago. Returns the result.

    `etag`: of current.json when that command looked at it.
    """
    base, _, digest = result.uri.rpartition("@")
    uri = store.join(base, "current.json")
    wanted = _pointer(digest, result.details.get("account", ""))
    former = store.read_json(uri) if result.reused and etag is not None else None
    if not result.reused or former == wanted:
        return result
    try:
        store.write_json(uri, wanted, if_match=etag, if_absent=etag is None)
    except store.Conflict:
        raise CorpusError(f"{uri} was moved by another writer just now; run the same command again") from None
    moved = former is not None and former["digest"] != digest
    before = f", it was {former['digest'][:12]}" if former and moved else ""
    say(f"{result.stage}: current is {digest[:12]} again{before}")
    return result


def _pointer(digest: str, account: str) -> dict[str, str]:
    return {"digest": digest} | ({"account": account} if account else {})
