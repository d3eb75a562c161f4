"""Where images come from: class folders (local or in a bucket), a list, IDX files, WebDataset tars, another corpus.

`open_source` lists and decides the kind; `Source.entries` says what each sample is, as columns for the plan.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines import store
from pipelines.corpus.entries import Entries
from pipelines.corpus.errors import SourceError
from pipelines.corpus.labels import is_text
from pipelines.corpus.listing import PACKED, SourceFile, list_files, listing_digest, packed_hint

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
KINDS: dict[Kind, str] = {"idx": "IDX files", "tars": "tars", "files": "image files"}
IMAGE_NAMES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True, slots=True)
class Source:
    uri: str
    kind: Kind
    files: Sequence[SourceFile]
    ignored: dict[str, int]
    rows: Any = None  # Entries of a list; the corpus that is read.

    @property
    def digest(self) -> str:
        if self.kind == "corpus":
            return str(self.rows.digest)
        return listing_digest(self.kind, self.files)

    @property
    def has_idle_folders(self) -> bool:
        """Whether there are class folders by their place that hold no image."""
        if self.kind != "files":
            return False
        has_splits = _are_splits(_image_depths(self.files))
        classes = _class_folders(self.files, has_splits)
        return any(folder and folder not in classes for _, folder in (_place(f.path, has_splits) for f in self.files))

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
                entries = self.rows
            case "corpus":
                from pipelines.corpus.recast import corpus_entries

                entries = corpus_entries(self.rows)
            case "files":
                entries = _folder_entries(self.uri, self.files)
        entries.ignored.update(self.ignored)
        _check(self, entries, min_classes)
        return entries


def open_source(uri: str) -> Source:
    """List a source and see what it is. Raises SourceError."""
    from pipelines.corpus.idx import is_idx
    from pipelines.corpus.lists import is_list, read_list

    if not uri.strip():
        raise SourceError("source is empty; it takes a folder, an s3://BUCKET/PREFIX, a list of images or a corpus")
    if VERSION.search(uri) and (store.is_s3(uri) or not Path(uri).expanduser().is_dir()):
        from pipelines.corpus.manifest import open_corpus

        return Source(uri, "corpus", [], {}, open_corpus(uri))
    if is_list(uri):
        files, entries = read_list(uri)
        return Source(uri, "list", files, {}, entries)
    files, ignored = list_files(uri)

    kinds = Counter(_kind_of(file.path, is_idx) for file in files)
    present = [f"{kinds[kind]:,} {name}" for kind, name in KINDS.items() if kinds[kind]]
    if len(present) > 1:
        raise SourceError(f"source {uri} holds {' and '.join(present)}; point it at a folder with one kind of them")
    if not present:
        if packed := next((file.path for file in files if file.path.lower().endswith(PACKED)), ""):
            raise SourceError(f"source {uri} holds no image and no .tar; {packed_hint(packed)}")
        shown = ", ".join(file.path for file in files[:3])
        raise SourceError(
            f"source {uri} holds no image: {len(files):,} other files such as {shown};"
            " it takes class folders with JPEG, PNG or WebP images, IDX files or WebDataset tars"
        )
    (kind,) = [kind for kind in KINDS if kinds[kind]]
    return Source(uri, kind, files, ignored)


def _kind_of(path: str, is_idx: Callable[[str], bool]) -> Kind | None:
    if path.endswith(".tar"):
        return "tars"
    return "idx" if is_idx(path) else "files" if _is_image_name(path) else None


def split_from_name(name: str) -> str | None:
    """The split that a file name or folder speaks of: train-00.tar, imagenet_val_01.tar, t10k-images-idx3-ubyte."""
    words = [SPLIT_NAMES[word] for word in re.split(r"[^a-z0-9]+", name.lower()) if word in SPLIT_NAMES]
    return words[0] if words else None


def _is_image_name(path: str) -> bool:
    return path.lower().endswith(IMAGE_NAMES)


def _folder_entries(uri: str, files: Sequence[SourceFile]) -> Entries:
    """[SPLIT/]CLASS/.../FILE. Top-level folders are splits if all of them have names of splits, else classes.

    A folder without a single image by name, such as `metadata` or `ImageSets`, is no class: its files are ignored.
    """
    depths = _image_depths(files)
    has_splits = _are_splits(depths)
    if has_splits and max(depths.values()) < 2:
        raise SourceError(
            f"source {uri}: {', '.join(sorted(depths))} hold images and no class folders; it takes [SPLIT/]CLASS/FILE"
        )
    classes = _class_folders(files, has_splits)
    entries = Entries()
    for file in files:
        split, folder = _place(file.path, has_splits)
        if not is_text(file.path):
            entries.reject(file.path, split, "bad_name", "the file name is not UTF-8; rename it")
        elif folder in classes:
            entries.add(file.path, file.uri, -1, file.size, file.etag, split, folder)
        elif folder:
            entries.ignored["folder_without_image"] += 1
        elif _is_image_name(file.path):
            entries.reject(file.path, split, "missing_label", "the image lies in no class folder")
        else:
            entries.ignored["other"] += 1  # A README, a licence, a list of classes beside the class folders.
    return entries


def _image_depths(files: Sequence[SourceFile]) -> dict[str, int]:
    """By top-level folder, how deep an image lies below it."""
    depths: dict[str, int] = {}
    for file in files:
        top, *below = file.path.split("/")
        if below and _is_image_name(file.path):
            depths[top] = max(depths.get(top, 0), len(below))
    return depths


def _are_splits(folders: Collection[str]) -> bool:
    return bool(folders) and all(folder.lower() in SPLIT_NAMES for folder in folders)


def _place(path: str, has_splits: bool) -> tuple[str | None, str]:
    """The split of a file, and its class folder; "" if it lies in none."""
    top, *below = path.split("/")
    split = SPLIT_NAMES.get(top.lower()) if has_splits and below else None
    names = below if split else [top, *below]
    return split, names[0] if len(names) > 1 else ""


def _class_folders(files: Sequence[SourceFile], has_splits: bool) -> set[str]:
    """Folders in which anything may be an image by its name; without an ending it may be one."""
    return {
        folder
        for file in files
        if _is_image_name(file.path) or "." not in file.path.rpartition("/")[2]
        if (folder := _place(file.path, has_splits)[1])
    }


def _check(source: Source, entries: Entries, min_classes: int) -> None:
    uri, is_folder = source.uri, source.kind == "files"
    if not len(entries):
        reasons = Counter(item.reason for item in entries.rejected)
        raise SourceError(
            f"source {uri} gives no sample ({dict(reasons)})" + "; images lie in one folder per class" * is_folder
        )
    names = entries.labels.keys()
    if len(names) < min_classes:
        raise SourceError(
            f"source {uri} has one class only ({', '.join(map(str, names))}); a classifier needs two or more"
            + ": the source is the folder above the class folders" * is_folder
        )
    if repeated := entries.repeated():
        first, second = repeated
        if first == second:
            raise SourceError(f"source {uri}: {first} occurs twice; sample names must differ")
        raise SourceError(f"source {uri}: {first} and {second} have the same 64-bit key; rename one of them")
