"""Is a corpus still what its manifest says? Each tar read whole, each sample held against its row."""

from __future__ import annotations

import bisect
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from pipelines import store
from pipelines.corpus.adoption import scan_id, split_of
from pipelines.corpus.changed import SHARD_NAME
from pipelines.corpus.checks import check_image
from pipelines.corpus.errors import CorpusError, ManifestError
from pipelines.corpus.images import MAX_FILE_BYTES, ImageRejected
from pipelines.corpus.labels import LABEL_BYTES, parse_labels, read_label
from pipelines.corpus.manifest import Corpus, open_corpus
from pipelines.corpus.members import IMAGE_EXTENSIONS, Member, TarStream
from pipelines.corpus.plan import load_plan
from pipelines.corpus.rows import shard_rows

__all__ = ["PROBLEMS", "Finding", "check_manifest", "check_shard", "stray_tars"]

PROBLEMS = {
    "manifest": "the manifest contradicts itself",
    "missing": "the tar is not there",
    "size": "the tar has another size: truncated or replaced",
    "unreadable": "the store does not give the bytes",
    "sha256": "the bytes are not those of the manifest",
    "tar": "a header is broken, or the tar ends too early",
    "rows": "the sample table has other samples than the shard table says",
    "pages": "a page does not frame its samples",
    "key": "another sample lies where the table says",
    "content": "the image is not the one that was hashed",
    "label": "the tar has another label than the table",
    "image": "the image cannot be read, or has another size than the table says",
    "stray": "a tar that no version lists and no unfinished run planned",
}
BLAME = {
    True: "; under its old ETag: the store gives other bytes than it took",
    False: "; its ETag is another one too: it was written over",
    None: "",
}
SHOWN = 20  # Findings of one kind and tar that are listed; all are counted.


@dataclass(frozen=True, slots=True)
class Finding:
    kind: str  # One of PROBLEMS.
    where: str
    detail: str


@dataclass(slots=True)
class _Found:
    findings: list[list[str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, detail: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= SHOWN:
            self.findings.append([kind, detail])


# The manifest ---------------------------------------------------------------------------------------------------------


def check_manifest(corpus: Corpus) -> Iterator[Finding]:
    """What can be seen without a tar. A damaged shard table raises ManifestError: nothing can be checked by it."""
    head, table = corpus.head, corpus.table
    if store.read_json(store.join(corpus.manifest, "head.json"))["digest"] != corpus.manifest.rpartition("/")[2]:
        yield Finding("manifest", "head.json", f"digest {head.digest[:12]} lies under {corpus.manifest}")
    found = {"shards": table.num_rows, "bytes": sum(table["bytes"].to_pylist())}
    for name, value in found.items():
        if getattr(head, name) != value:
            yield Finding("manifest", "head.json", f"{name} {getattr(head, name):,}, shards.parquet has {value:,}")
    if "times" not in table.column_names:
        samples: Counter[str] = Counter()
        for split, count in zip(table["split"].to_pylist(), table["samples"].to_pylist(), strict=True):
            samples[split] += count
        if dict(samples) != head.splits:
            yield Finding("manifest", "head.json", f"splits {head.splits}, shards.parquet has {dict(samples)}")
    try:
        reasons = Counter(corpus.quarantine()["reason"].to_pylist())
        if dict(reasons) != head.rejected:
            detail = f"rejected {head.rejected}, quarantine.parquet has {dict(sorted(reasons.items()))}"
            yield Finding("manifest", "quarantine.parquet", detail)
    except ManifestError as error:
        yield Finding("manifest", "quarantine.parquet", str(error))


def stray_tars(corpus: Corpus) -> tuple[list[Finding], int, int]:
    """Tars beside the corpus that no version lists; how many of those an unfinished run has planned, how many a
    finished one: what it made was a version already, over tars of an earlier run.
    """
    versions = [corpus.digest]
    folder = store.join(corpus.uri, "manifests")
    versions += [info.uri.split("/")[-2] for info in store.list_objects(folder) if info.uri.endswith("/head.json")]
    known: set[str] = set()
    for digest in dict.fromkeys(versions):
        one = open_corpus(f"{corpus.uri}@{digest}")
        known |= {one.shard_uri(shard) for shard in range(one.head.shards)}
    plans = _list_plans(corpus.uri)
    is_adopted = corpus.head.recipe.get("stage") == "index"
    place = corpus.head.source if is_adopted else store.join(corpus.uri, "shards")
    if is_adopted and place in known:  # Of one tar nothing is known about those beside it.
        return [], 0, 0
    strays: list[Finding] = []
    unlisted: Counter[str] = Counter()
    for info in store.list_objects(place):
        if not info.uri.endswith(".tar") or info.uri in known:
            continue
        name = info.uri.removeprefix(place.rstrip("/") + "/")
        if (made := SHARD_NAME.search(name)) and made[1] in plans:
            unlisted[plans[made[1]]] += 1
            continue
        if is_adopted and _has_no_sample(corpus, info, name):
            continue
        remedy = "`vit index` takes it in" if is_adopted else "delete it, or find out who put it there"
        strays.append(Finding("stray", name, f"{info.size:,} bytes that no version lists; {remedy}"))
    done = sum(count for plan, count in unlisted.items() if _is_finished(corpus.uri, plan))
    return strays, unlisted.total() - done, done


def _has_no_sample(corpus: Corpus, info: store.ObjectInfo, name: str) -> bool:
    """Whether `vit index` has read this tar as it is now and found nothing in it to list."""
    scan = _scan_of(info, name, split_of(name, corpus.head.recipe.get("split", "train")))
    for place in _scans(corpus.uri):
        try:
            return int(store.read_json(store.join(place, f"{scan}.json"))["samples"]) == 0
        except store.NotFound:
            continue
    return False


def _is_finished(base: str, plan: str) -> bool:
    """Whether every shard of a plan has left its record."""
    uri = store.join(base, "plans", plan)
    records = sum(info.uri.endswith(".json") for info in store.list_objects(store.join(uri, "shards")))
    try:
        return records == len(load_plan(uri).shards)
    except (store.StoreError, CorpusError, KeyError):  # Of another release, or damaged: nothing is known.
        return False


# One tar --------------------------------------------------------------------------------------------------------------


def check_shard(item: Mapping[str, Any], reference: str, deep: bool, run: str) -> dict[str, Any]:
    """Returns {findings, counts, sha256, samples, bytes, written_again}.

    `item` names the shard by number, `run` the verification: within one, a process opens the corpus once.
    Never raises for damage. `written_again`: the bytes are right, the ETag is not the one that the writer saw.
    """
    corpus = _corpus(reference, run)
    shard = int(item["shard"])
    row = {name: corpus.table[name][shard].as_py() for name in corpus.table.column_names}
    found = _Found()
    sha256, samples, size = "", 0, 0
    same_etag: bool | None = None
    try:
        info = store.stat(corpus.shard_uri(shard))
        size = info.size
        same_etag = has_etag_of_writer(corpus, shard, info)
        if size != row["bytes"]:
            found.add("size", f"{size:,} bytes, the manifest says {row['bytes']:,}")
        sha256, samples = _check_bytes(corpus, shard, row, info, deep, found)
    except store.NotFound:
        found.add("missing", f"{corpus.shard_uri(shard)} is not there; restore it")
    except store.StoreError as error:
        found.add("unreadable", str(error))
    except ManifestError as error:
        found.add("rows", str(error))
    if sha256 and sha256 != row["sha256"]:
        found.add("sha256", f"{sha256[:12]}, the manifest says {row['sha256'][:12]}{BLAME[same_etag]}")
    return {
        "findings": found.findings,
        "counts": dict(found.counts),
        "sha256": sha256,
        "samples": samples,
        "bytes": size,
        "written_again": same_etag is False and not found.counts,
    }


def has_etag_of_writer(corpus: Corpus, shard: int, info: store.ObjectInfo) -> bool | None:
    """Whether the tar has the ETag that was seen when it was written or indexed; None: that is not known any more.

    No part of the manifest: the same corpus made twice is the same bytes. Records of the plan and of scans have it.
    """
    origin, name, split = corpus, corpus.table["name"][shard].as_py(), corpus.table["split"][shard].as_py()
    if corpus.layout.source is not None:
        origin = corpus.source(int(corpus.layout.source[shard]))
    try:
        if made := SHARD_NAME.search(name):
            plan = _plans(origin.uri).get(made[1], "")
            record = store.read_json(store.join(origin.uri, "plans", plan, "shards", f"{made[2]}.json"))
            return bool(record["etag"] == info.etag)
        places = _scans(origin.uri)
    except store.NotFound:
        return None
    scan = _scan_of(info, name, split)
    return any(store.exists(store.join(place, f"{scan}.json")) for place in places) if places else None


def _scan_of(info: store.ObjectInfo, path: str, split: str) -> str:
    # A local tar was listed without its inode.
    etag = info.etag if store.is_s3(info.uri) else info.etag.rpartition("-")[0]
    return scan_id({"path": path, "size": info.size, "etag": etag, "split": split})


@lru_cache(maxsize=8)
def _plans(base: str) -> dict[str, str]:
    return _list_plans(base)


def _list_plans(base: str) -> dict[str, str]:
    """Digests of the plans by their first digits."""
    found = [info.uri.split("/") for info in store.list_objects(store.join(base, "plans"))]
    return {parts[-2][:12]: parts[-2] for parts in found if parts[-1] == "plan.json"}


@lru_cache(maxsize=8)
def _scans(base: str) -> list[str]:
    found = [info.uri for info in store.list_objects(store.join(base, "scans"))]
    return [uri.removesuffix("/about.json") for uri in found if uri.endswith("/about.json")]


@lru_cache(maxsize=2)
def _corpus(reference: str, run: str) -> Corpus:
    return open_corpus(reference)


def _check_bytes(
    corpus: Corpus, shard: int, row: Mapping[str, Any], info: store.ObjectInfo, deep: bool, found: _Found
) -> tuple[str, int]:
    def read(start: int, length: int) -> bytes:
        return store.read(info.uri, start, length, if_match=info.etag)

    try:
        origin, table = shard_rows(corpus, shard)
        rows = table.to_pylist()
        problem = ""
    except ManifestError as error:
        origin, rows, problem = corpus, [], str(error)
    if problem or len(rows) != row["samples"]:
        found.add("rows", problem or f"{len(rows):,} rows, the shard has {row['samples']:,} samples")
    _check_pages(row, rows, found)
    held = _Held(origin, rows, deep, found)
    stream = TarStream(read, info.size)
    for member in stream.members():
        held.take(member, stream)
    held.end()
    if stream.damage is not None:
        found.add("tar", f"byte {stream.damage[0]:,}: {stream.damage[1]}")
    return stream.sha256, held.whole


def _check_pages(shard: Mapping[str, Any], rows: list[dict[str, Any]], found: _Found) -> None:
    """A page begins with its first sample and ends with its last one; between them nothing is left out."""
    at = 0
    for offset, length, count in zip(shard["page_offset"], shard["page_length"], shard["page_rows"], strict=True):
        own = rows[at : at + count]
        at += count
        if len(own) != count:
            found.add("pages", f"the page at byte {offset:,} has {count} samples, the table {len(own)} more")
            return
        ends = [offset, *(row["offset"] + row["bytes"] for row in own)]
        if [row["offset"] for row in own] != ends[:-1] or ends[-1] != offset + length:
            found.add("pages", f"the page at byte {offset:,} of {length:,} bytes does not frame its {count} samples")


class _Held:
    """Rows of the table, held against members as they pass."""

    def __init__(self, corpus: Corpus, rows: list[dict[str, Any]], deep: bool, found: _Found) -> None:
        self._numbers = {name: number for number, name in enumerate(corpus.class_names)}
        self._rows, self._deep, self._found = rows, deep, found
        self._starts = [row["offset"] for row in rows]
        self._members: dict[str, bytes] = {}
        self._current = -1
        self.whole = 0

    def take(self, member: Member, stream: TarStream) -> None:
        row = bisect.bisect_right(self._starts, member.start) - 1
        if row < 0 or member.start >= self._rows[row]["offset"] + self._rows[row]["bytes"]:
            return  # In a gap: rejected when the tar was indexed.
        if row != self._current:
            self._close()
            self._current, self._members = row, {}
        if member.kind != "file":
            return
        name = member.name.decode("utf-8", "replace")
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot:
            return
        if folder + slash + stem != self._rows[row]["key"]:
            self._found.add("key", f"{name} lies where the table has sample {self._rows[row]['key']}")
            return
        limit = LABEL_BYTES if extension.lower() in ("cls", "json") else MAX_FILE_BYTES
        if extension.lower() in (*IMAGE_EXTENSIONS, "cls", "json") and member.size <= limit:
            self._members[extension.lower()] = stream.content(member)

    def end(self) -> None:
        self._close()
        if self.whole < len(self._rows):
            self._found.add("rows", f"{len(self._rows) - self.whole:,} samples of the table were not met whole")

    def _close(self) -> None:
        if self._current < 0:
            return
        row, members = self._rows[self._current], self._members
        image = next((members[name] for name in IMAGE_EXTENSIONS if name in members), None)
        if image is None:
            self._found.add("key", f"sample {row['key']} has no image at byte {row['offset']:,}")
            return
        self.whole += 1
        if hashlib.sha256(image).digest()[:16] != row["content"]:
            self._found.add("content", f"sample {row['key']} at byte {row['offset']:,}")
        self._check_label(row, members)
        try:
            facts = check_image(image, decode=self._deep)
        except ImageRejected as error:
            self._found.add("image", f"sample {row['key']}: {error}")
            return
        if (facts.width, facts.height) != (row["width"], row["height"]):
            size = f"{facts.width}x{facts.height}, the table says {row['width']}x{row['height']}"
            self._found.add("image", f"sample {row['key']} is {size}")

    def _check_label(self, row: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
        label: Any
        label = read_label(members.get("cls"), members.get("json"))
        label = self._numbers.get(label, label) if isinstance(label, str) else label
        wanted = row.get("label")
        if row.get("labels") is not None:
            several = parse_labels(members.get("json", b"")) if label is None else (label,)
            named = [self._numbers.get(one, -1) if isinstance(one, str) else one for one in several or ()]
            label, wanted = sorted(named), row["labels"]
        if label != wanted:
            self._found.add("label", f"sample {row['key']} has {label!r}, the table says {wanted!r}")
