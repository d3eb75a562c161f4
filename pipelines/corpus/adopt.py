"""One tar that somebody else wrote: which samples it holds, where they lie, what is odd about it. One pass, no copy.

The reader later fetches pages and groups members as `pipelines.reader.tar` does, so a page never spans what that walk
would stumble over: a rejected sample or an unsupported member ends the page before it.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipelines.corpus.anomalies import Anomalies
from pipelines.corpus.checks import check_image, is_named_as
from pipelines.corpus.images import MAX_FILE_BYTES, ImageFacts, ImageRejected
from pipelines.corpus.labels import LABEL_BYTES, Label, parse_cls, parse_json, read_any_label
from pipelines.corpus.members import IMAGE_EXTENSIONS, Member, TarStream
from pipelines.corpus.pages import close_pages
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.scanned import ScannedTar
from pipelines.corpus.tar import ROW_FIELDS, row_schema

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["scan_tar"]

OTHER_IMAGES = ("gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "heic", "jp2", "jxl")
MAX_SAMPLE_BYTES = 256 << 20  # Members of one sample together: a page is fetched whole.
LOOSE_BYTES = 64 << 10  # Members of no sample that a page may carry along before it is closed.
ANOMALY_OF = {  # Reasons of the quarantine that are faults of the tar, not of the image.
    "missing_image": "missing_member",
    "missing_label": "missing_member",
    "scattered_key": "scattered_key",
    "duplicate_member": "duplicate_member",
    "dotted_key": "dotted_key",
    "repeated_key": "repeated_key",
    "oversized": "oversized_sample",
}


def scan_tar(
    path: str, size: int, read: Callable[[int, int], bytes], *, split: str, decode: bool
) -> tuple[ScannedTar, pa.Table]:
    """`path` names the tar in the manifest; `read(start, length)` gives its bytes. Returns its rows as well."""
    scan = _Scan(path, split, decode)
    stream = TarStream(read, size)
    for member in stream.members():
        scan.take(member, stream)
    scan.end(stream)
    return scan.result(stream), scan.table()


@dataclass(slots=True)
class _Sample:
    """The members of one key that lie together."""

    key: str
    start: int
    end: int  # Of its last member; loose members after it may lengthen it.
    names: list[str] = field(default_factory=list)  # Extensions in lower case.
    image: bytes | None = None
    extension: str = ""
    image_size: int = -1
    cls: bytes | None = None
    described: bytes | None = None
    has_duplicate: str = ""
    loose: int = 0

    def label(self) -> Label | None:
        label = read_any_label(self.cls, self.described)
        numbers = label if isinstance(label, tuple) else (label,)
        # The table has 32 bits for it; `name_labels` says what is too large of the others.
        return None if any(isinstance(one, int) and one >= 1 << 31 for one in numbers) else label


class _Scan:
    def __init__(self, path: str, split: str, decode: bool) -> None:
        self._path, self._split, self._decode = path, split, decode
        self._open: _Sample | None = None
        self._columns: dict[str, list[Any]] = {name: [] for name in ROW_FIELDS}
        self._stretches: list[tuple[int, list[int]]] = []  # Start, and lengths of samples that follow without a gap.
        self._stretch_end = -1
        self._whole: set[str] = set()  # Keys of samples that are in the table.
        self._seen: Counter[str] = Counter()  # Keys, by how many runs of members have them.
        self._names: dict[str, int] = {}
        self._numbers: set[int] = set()
        self._multi_label = False
        self._rejected: list[Rejected] = []
        self._starts: dict[int, int] = {}  # Byte at which a rejected sample begins, by its place in that list.
        self._noted: Counter[str] = Counter()
        self._ignored: Counter[str] = Counter()
        self._anomalies = Anomalies(path)

    # Members --------------------------------------------------------------------------------------------------------

    def take(self, member: Member, stream: TarStream) -> None:
        if member.kind == "folder":
            self._pass_over(member)
            return
        if member.kind == "unsupported":
            self._break()
            self._ignored["tar_link_or_device"] += 1
            self._anomalies.add("unsupported_member", member.start, _shown(member.name), member.detail)
            return
        name = self._safe_name(member)
        if name is None:
            return
        folder, slash, base = name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not dot or not stem:  # As the webdataset package does.
            self._ignored["tar_member_without_key"] += 1
            self._anomalies.add("loose_member", member.start, name, f"{member.size:,} bytes")
            self._pass_over(member)
            return
        key = f"{folder}{slash}{stem}"
        if self._open is None or self._open.key != key:
            self._close()
            self._open = _Sample(key, member.start, member.end)
        self._add(self._open, member, extension.lower(), stream)

    def _add(self, sample: _Sample, member: Member, extension: str, stream: TarStream) -> None:
        sample.end, sample.loose = member.end, 0
        if extension in sample.names:
            sample.has_duplicate = extension
            return
        sample.names.append(extension)
        if extension in IMAGE_EXTENSIONS:
            rank = IMAGE_EXTENSIONS.index(extension)
            if not sample.extension or rank < IMAGE_EXTENSIONS.index(sample.extension):
                sample.extension, sample.image_size = extension, member.size
                sample.image = stream.content(member) if member.size <= MAX_FILE_BYTES else None
        elif extension in ("cls", "json") and member.size <= LABEL_BYTES:
            if extension == "cls":
                sample.cls = stream.content(member)
            else:
                sample.described = stream.content(member)

    def _safe_name(self, member: Member) -> str | None:
        """The name as text. A bad one ends the page and goes to quarantine."""
        try:
            name = member.name.decode()
            problem = "leaves the archive" if name.startswith("/") or ".." in name.split("/")[:-1] else ""
        except UnicodeDecodeError:
            name, problem = _shown(member.name), "is not UTF-8"
        if not problem:
            return name
        self._break()
        self._anomalies.add("unsafe_name", member.start, name, f"the member name {problem}")
        if name.rpartition("/")[2].lower().rpartition(".")[2] in (*IMAGE_EXTENSIONS, *OTHER_IMAGES):
            self._reject(name, name, "bad_name", f"the member name {problem}")
        return None

    def _pass_over(self, member: Member) -> None:
        """Folders and members of no sample may lie inside a page, if they are short."""
        sample = self._open
        if sample is None:
            return
        if member.start == sample.end and sample.loose + member.end - member.start <= LOOSE_BYTES:
            sample.loose += member.end - member.start
            sample.end = member.end
        else:
            self._break()

    def _break(self) -> None:
        """No page goes on over this place."""
        self._close()
        self._stretch_end = -1

    # Samples --------------------------------------------------------------------------------------------------------

    def _close(self) -> None:
        sample, self._open = self._open, None
        if sample is None:
            return
        self._seen[sample.key] += 1
        try:
            label = self._label(sample)
            facts = self._check(sample)
        except ImageRejected as problem:
            self._stretch_end = -1
            self._starts[len(self._rejected)] = sample.start
            self._reject(sample.key, self._source(sample), problem.reason, problem.detail)
            return
        self._whole.add(sample.key)
        self._count(sample, facts)
        self._row(sample, facts, label)

    def _label(self, sample: _Sample) -> Label:
        """The label of a sample that can be one. Raises ImageRejected."""
        members = f"members: {', '.join(sorted(sample.names))}"
        if sample.has_duplicate:
            raise ImageRejected("duplicate_member", f"two members {sample.has_duplicate!r}")
        if sample.end - sample.start > MAX_SAMPLE_BYTES:
            size = sample.end - sample.start
            raise ImageRejected("oversized", f"{size:,} bytes together, the limit is {MAX_SAMPLE_BYTES:,}; {members}")
        if not sample.extension:
            ends = {name.rpartition(".")[2] for name in sample.names if "." in name}
            if ends & {*IMAGE_EXTENSIONS, *OTHER_IMAGES}:
                raise ImageRejected("dotted_key", f"readers take the key for {sample.key!r}; {members}")
            if other := next((name for name in OTHER_IMAGES if name in sample.names), ""):
                raise ImageRejected("unsupported_format", f"a .{other} member; convert it to JPEG, PNG or WebP")
            raise ImageRejected("missing_image", members)
        if sample.key in self._whole:
            raise ImageRejected("repeated_key", f"a sample of this key lies before it in {self._path}")
        label = sample.label()
        if label is None:
            raise ImageRejected("missing_label", f"no usable .cls or .json beside the image; {members}")
        return label

    def _check(self, sample: _Sample) -> ImageFacts:
        if sample.image is None:
            raise ImageRejected("bomb", f"{sample.image_size:,} bytes, the limit is {MAX_FILE_BYTES:,}")
        return check_image(sample.image, decode=self._decode)

    def _count(self, sample: _Sample, facts: ImageFacts) -> None:
        self._noted.update(facts.notes)
        if not is_named_as(self._source(sample), facts.extension):
            self._noted["renamed"] += 1
        for name in sample.names:
            if name not in (sample.extension, "cls", "json"):
                self._ignored[f"tar_member_{name}"] += 1
        if sample.cls is not None and sample.described is not None:
            labels = parse_cls(sample.cls), parse_json(sample.described)
            if None not in labels and type(labels[0]) is type(labels[1]) and labels[0] != labels[1]:
                detail = f".cls says {labels[0]!r}, .json says {labels[1]!r}"
                self._anomalies.add("label_conflict", sample.start, sample.key, detail)

    def _row(self, sample: _Sample, facts: ImageFacts, label: Label) -> None:
        number: int | list[int]
        if isinstance(label, tuple):
            self._multi_label = True
            number = sorted(map(self._number, label))
        else:
            number = self._number(label)
        length = sample.end - sample.start
        if sample.start != self._stretch_end:
            self._stretches.append((sample.start, []))
        self._stretches[-1][1].append(length)
        self._stretch_end = sample.end
        assert sample.image is not None
        content = hashlib.sha256(sample.image).digest()[:16]
        row = len(self._columns["row"])
        source = self._source(sample)
        values = (row, sample.start, length, facts.width, facts.height, number, sample.key, source, content)
        for name, value in zip(ROW_FIELDS, values, strict=True):
            self._columns[name].append(value)

    def _number(self, label: int | str) -> int:
        """The class number, or of a name its place among the names of this tar."""
        if isinstance(label, str):
            return self._names.setdefault(label, len(self._names))
        self._numbers.add(label)
        return label

    def _source(self, sample: _Sample) -> str:
        end = f".{sample.extension}" if sample.extension else ""
        return f"{self._path}/{sample.key}{end}"

    def _reject(self, key: str, source: str, reason: str, detail: str) -> None:
        if not source.startswith(f"{self._path}/"):
            source = f"{self._path}/{source}"
        self._rejected.append(Rejected(key, source, self._split, -1, reason, detail))

    # The whole ------------------------------------------------------------------------------------------------------

    def end(self, stream: TarStream) -> None:
        if stream.damage is not None:
            offset, text = stream.damage
            if self._open is not None and self._open.end >= offset:
                # The damaged bytes may have been one of its members.
                detail = f"the tar breaks off after its {', '.join(self._open.names)}"
                self._reject(self._open.key, self._source(self._open), "truncated", detail)
                self._open = None
            self._anomalies.add("damaged", offset, detail=text)
        elif not stream.has_end_mark:
            self._anomalies.add("no_end_mark", stream.size)
            self._ignored["tar_without_end_mark"] += 1
        self._close()
        self._gather()
        if stream.trailing:
            detail = f"{stream.trailing:,} bytes; two archives laid end to end?"
            self._anomalies.add("trailing_data", stream.size - stream.trailing, detail=detail)
        if not self._columns["row"]:
            self._anomalies.add("no_sample")

    def _gather(self) -> None:
        """A sample in pieces looks like several that lack a member: now that all keys are known, it is called so."""
        for number, item in enumerate(self._rejected):
            if item.reason in ("missing_label", "missing_image") and self._seen[item.key] > 1:
                detail = f"its members lie in {self._seen[item.key]} places; {item.detail}"
                self._rejected[number] = item = dataclasses.replace(item, reason="scattered_key", detail=detail)
            if number in self._starts and item.reason in ANOMALY_OF:
                self._anomalies.add(ANOMALY_OF[item.reason], self._starts[number], item.key, item.detail)

    def _pages(self) -> Iterator[tuple[int, int, int]]:
        for start, lengths in self._stretches:
            for offset, length, rows in zip(*close_pages(lengths), strict=True):
                yield start + offset, length, rows

    def table(self) -> pa.Table:
        import pyarrow as pa

        if not self._multi_label:
            return pa.table(self._columns, schema=row_schema())
        columns = dict(self._columns)
        columns["labels"] = [one if isinstance(one, list) else [one] for one in columns.pop("label")]
        return pa.table(columns, schema=row_schema(multi_label=True))

    def result(self, stream: TarStream) -> ScannedTar:
        pages = list(self._pages())
        return ScannedTar(
            bytes=stream.size,
            sha256=stream.sha256,
            samples=len(self._columns["row"]),
            page_offset=[page[0] for page in pages],
            page_length=[page[1] for page in pages],
            page_rows=[page[2] for page in pages],
            numbers=[min(self._numbers), max(self._numbers)] if self._numbers else [],
            names=list(self._names),
            multi_label=self._multi_label,
            rejected=self._rejected,
            noted=dict(sorted(self._noted.items())),
            ignored=dict(sorted(self._ignored.items())),
            anomalies=self._anomalies.listed,
            anomaly_counts=dict(self._anomalies.counts),
            damage="" if stream.damage is None else f"byte {stream.damage[0]:,}: {stream.damage[1]}",
        )


def _shown(name: bytes) -> str:
    return name[:200].decode("utf-8", "backslashreplace")
