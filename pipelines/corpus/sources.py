"""Where images come from: class folders (local or in a bucket), a list, IDX files, WebDataset tars, another corpus.

`open_source` lists and decides the kind; `Source.entries` says what each sample is, as columns for the plan.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipelines.corpus.errors import SourceError
from pipelines.corpus.listing import SourceFile, list_files, listing_digest
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.tar import sample_key

__all__ = ["Entries", "Source", "open_source", "split_from_name"]

Kind = Literal["files", "list", "idx", "tars", "corpus"]
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
    "t10k": "test",  # MNIST's own name of its test set.
}
VERSION = re.compile(r"@(current|[0-9a-f]{12,64})$")  # The source is a corpus.
IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(slots=True)
class Entries:
    """One entry a sample, as columns."""

    path: list[str] = field(default_factory=list)  # Relative source path: names the sample for ever.
    uri: list[str] = field(default_factory=list)  # Object that holds its bytes.
    offset: list[int] = field(default_factory=list)  # Row of an IDX file, byte in a tar, -1: the whole object.
    size: list[int] = field(default_factory=list)  # Source bytes.
    etag: list[str] = field(default_factory=list)
    split: list[str | None] = field(default_factory=list)  # None: the source does not say.
    label: list[Any] = field(default_factory=list)  # Class name, or its number; with multi_label a tuple of them.
    times: list[int] = field(default_factory=list)  # How often each comes per epoch, of another corpus; empty: once.
    multi_label: bool = False
    class_names: tuple[str, ...] | None = None  # Where labels are numbers and the source names them.
    rejected: list[Rejected] = field(default_factory=list)
    ignored: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.path)

    def add(self, path: str, uri: str, offset: int, size: int, etag: str, split: str | None, label: Any) -> None:
        self.path.append(path)
        self.uri.append(uri)
        self.offset.append(offset)
        self.size.append(size)
        self.etag.append(etag)
        self.split.append(split)
        self.label.append(label)

    def reject(self, path: str, split: str | None, reason: str, detail: str) -> None:
        shown = path.encode("utf-8", "backslashreplace").decode()
        self.rejected.append(Rejected(sample_key(path), shown, split or "", -1, reason, detail))


@dataclass(frozen=True, slots=True)
class Source:
    uri: str
    kind: Kind
    files: list[SourceFile]
    ignored: dict[str, int]
    rows: Any = None  # Of a list; the corpus that is read.

    @property
    def digest(self) -> str:
        if self.kind == "corpus":
            return str(self.rows.digest)
        return listing_digest(self.kind, self.files)

    def entries(self, *, min_classes: int = 2, num_workers: int | None = 0) -> Entries:
        """`num_workers`: tars indexed at a time, as in `map_items`."""
        match self.kind:
            case "idx":
                from pipelines.corpus.idx import idx_entries

                entries = idx_entries(self.files)
            case "tars":
                from pipelines.corpus.tars import tar_entries

                entries = tar_entries(self.files, num_workers)
            case "list":
                from pipelines.corpus.lists import list_entries

                entries = list_entries(*self.rows)
            case "corpus":
                from pipelines.corpus.recast import corpus_entries

                entries = corpus_entries(self.rows)
            case "files":
                entries = _folder_entries(self.uri, self.files)
        entries.ignored.update(self.ignored)
        _check(self.uri, entries, min_classes)
        return entries


def open_source(uri: str) -> Source:
    """List a source and see what it is. Raises SourceError."""
    from pipelines.corpus.idx import is_idx
    from pipelines.corpus.lists import is_list, list_files_of

    if VERSION.search(uri):
        from pipelines.corpus.manifest import open_corpus

        return Source(uri, "corpus", [], {}, open_corpus(uri))
    if is_list(uri):
        listed, rows, found = list_files_of(uri)
        return Source(uri, "list", [listed, *(file for file in found if not isinstance(file, str))], {}, (rows, found))
    files, ignored = list_files(uri)

    tars = [file for file in files if file.path.endswith(".tar")]
    idx = [file for file in files if is_idx(file.path)]
    images = [file for file in files if _is_image_name(file.path)]
    kinds = {"IDX files": idx, "tars": tars, "image files": images}
    present = [f"{len(found):,} {name}" for name, found in kinds.items() if found]
    if len(present) > 1:
        raise SourceError(f"source {uri} holds {' and '.join(present)}; point it at a folder with one kind of them")
    if not present:
        shown = ", ".join(file.path for file in files[:3])
        raise SourceError(
            f"source {uri} holds no image: {len(files):,} other files such as {shown};"
            " it takes class folders with JPEG, PNG or WebP images, IDX files or WebDataset tars"
        )
    kind: Kind = "idx" if idx else "tars" if tars else "files"
    return Source(uri, kind, files, ignored)


def split_from_name(name: str) -> str | None:
    """The split that a file name or folder speaks of: train-00.tar, imagenet_val_01.tar, t10k-images-idx3-ubyte."""
    words = [SPLIT_NAMES[word] for word in re.split(r"[^a-z0-9]+", name.lower()) if word in SPLIT_NAMES]
    return words[0] if words else None


def _is_image_name(path: str) -> bool:
    return path.lower().endswith(IMAGE_NAMES)


def _folder_entries(uri: str, files: Sequence[SourceFile]) -> Entries:
    """[SPLIT/]CLASS/.../FILE. Top-level folders are splits if all of them have names of splits, else classes."""
    images = [file.path.split("/") for file in files if _is_image_name(file.path)]
    tops = {parts[0] for parts in images if len(parts) > 1}
    has_splits = bool(tops) and all(top.lower() in SPLIT_NAMES for top in tops)
    if has_splits and not any(len(parts) > 2 for parts in images):
        raise SourceError(
            f"source {uri}: {', '.join(sorted(tops))} hold images and no class folders; it takes [SPLIT/]CLASS/FILE"
        )
    entries = Entries()
    for file in files:
        parts = file.path.split("/")
        split = SPLIT_NAMES.get(parts[0].lower()) if has_splits and len(parts) > 1 else None
        folders = parts[1:-1] if split else parts[:-1]
        if not _is_utf8(file.path):
            entries.reject(file.path, split, "bad_name", "the file name is not UTF-8; rename it")
        elif folders:
            entries.add(file.path, file.uri, -1, file.size, file.etag, split, folders[0])
        elif _is_image_name(file.path):
            entries.reject(file.path, split, "missing_label", "the image lies in no class folder")
        else:
            entries.ignored["other"] += 1  # A README, a licence, a list of classes beside the class folders.
    return entries


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check(uri: str, entries: Entries, min_classes: int) -> None:
    if not len(entries):
        reasons = Counter(item.reason for item in entries.rejected)
        raise SourceError(f"source {uri} gives no sample ({dict(reasons)}); images lie in one folder per class")
    labels = (label for labels in entries.label for label in labels) if entries.multi_label else entries.label
    if len(names := set(labels)) < min_classes:
        raise SourceError(
            f"source {uri} has one class only ({', '.join(map(str, names))}); a classifier needs two or more:"
            " the source is the folder above the class folders"
        )
    twice = _first_repeated(entries.path)
    if twice is not None:
        raise SourceError(f"source {uri}: {twice} occurs twice; sample names must differ")


def _first_repeated(paths: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            return path
        seen.add(path)
    return None
