"""Every file of a source with size and ETag: what the plan freezes and what names the input of `vit shard`.

Listed in the order of the paths as they are found, so that no list of objects is ever sorted or held: see `Files`.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

from pipelines import store
from pipelines.corpus.errors import SourceError
from pipelines.corpus.labels import is_text
from pipelines.corpus.texts import Texts

__all__ = [
    "PACKED",
    "Files",
    "SourceFile",
    "check_apart",
    "check_names",
    "is_hidden",
    "list_files",
    "listing_digest",
    "local_etag",
    "packed_hint",
]

PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
IGNORED_NAMES = frozenset({"Thumbs.db", "desktop.ini", "__MACOSX"})


@dataclass(frozen=True, slots=True)
class SourceFile:
    path: str  # Relative to the source, with slashes.
    uri: str
    size: int
    etag: str


class Files(Sequence[SourceFile]):
    """Many files, 28 bytes of memory each; the text of paths and ETags lies on disk if there is much of it."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self._path, self._etag, self._size = Texts(), Texts(), array("q")
        self._heads: dict[str, int] = {}  # What stands before the path in a URI: one, but for keys with "//".
        self._head = array("i")
        self.is_sorted = True
        before = ""
        for file in files:
            assert file.uri.endswith(file.path), f"{file.uri} does not lie where {file.path} says"
            self._head.append(self._heads.setdefault(file.uri.removesuffix(file.path), len(self._heads)))
            self._path.append(file.path)
            self._etag.append(file.etag)
            self._size.append(file.size)
            self.is_sorted &= before <= file.path
            before = file.path

    def __len__(self) -> int:
        return len(self._size)

    @overload
    def __getitem__(self, number: int) -> SourceFile: ...
    @overload
    def __getitem__(self, number: slice) -> list[SourceFile]: ...
    def __getitem__(self, number: int | slice) -> SourceFile | list[SourceFile]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        path = self._path[number]
        return SourceFile(path, list(self._heads)[self._head[number]] + path, self._size[number], self._etag[number])

    def __iter__(self) -> Iterator[SourceFile]:
        heads = list(self._heads)
        for path, head, size, etag in zip(self._path, self._head, self._size, self._etag, strict=True):
            yield SourceFile(path, heads[head] + path, size, etag)


def local_etag(status: os.stat_result) -> str:
    """Size and time of change. No inode: a copy that keeps its times is the same source."""
    return f"{status.st_size}-{status.st_mtime_ns}"


def check_names(files: Iterable[SourceFile]) -> None:
    """Of tars: the name is part of the path of each sample. Raises SourceError."""
    for file in files:
        if not is_text(file.path):
            raise SourceError(f"the tar name {file.uri!r} is not UTF-8; rename it")


def packed_hint(path: str) -> str:
    return f"{path} is compressed: no range of it can be read, unpack it (gunzip, zstd -d)"


def is_hidden(path: str) -> bool:
    return any(part.startswith(".") or part in IGNORED_NAMES for part in path.split("/"))


def check_apart(source: str, base: str) -> None:
    """What is written below the source would be a part of it the next time. Raises SourceError."""
    if store.is_s3(source) or store.is_s3(base):
        folder, place = (f"{uri.rstrip('/')}/" for uri in (source, base))
    else:
        folder, place = (f"{os.path.realpath(Path(path).expanduser()).rstrip('/')}/" for path in (source, base))
    if place.startswith(folder) and not is_hidden(place.removeprefix(folder).rstrip("/")):
        raise SourceError(
            f"destination {base} lies in the source {source}, which would hold its tars the next time;"
            " put it beside the source"
        )


def list_files(source: str) -> tuple[Files, dict[str, int]]:
    """All files below a folder, a bucket prefix, or one file; and how many were ignored, by kind."""
    ignored: Counter[str] = Counter()
    found = _bucket(source, ignored) if store.is_s3(source) else _folder(source, ignored)
    files = Files(found)
    if not files.is_sorted:  # S3 Express lists in no order.
        files = Files(sorted(files, key=lambda file: file.path))
    if not files:
        raise SourceError(
            f"source {source} is empty; it takes class folders with images, IDX files or WebDataset tars"
            + (f" (ignored: {dict(ignored)})" if ignored else "")
        )
    return files, dict(sorted(ignored.items()))


def _bucket(source: str, ignored: Counter[str]) -> Iterator[SourceFile]:
    source = source.rstrip("/")
    if source.endswith((".tar", *PACKED)):
        try:
            info = store.stat(source)
        except store.NotFound as error:
            raise SourceError(f"source {source} does not exist: {error}") from None
        yield SourceFile(source.rpartition("/")[2], source, info.size, info.etag)
        return
    try:
        for info in store.list_objects(source):
            path = info.uri.removeprefix(source).lstrip("/")
            if is_hidden(path):
                ignored["hidden"] += 1
            else:
                yield SourceFile(path, info.uri, info.size, info.etag)
    except store.NotFound as error:
        raise SourceError(f"source {source} does not exist: {error}") from None


def _folder(source: str, ignored: Counter[str]) -> Iterator[SourceFile]:
    base = Path(source).expanduser().absolute()
    if not base.exists():
        import difflib

        siblings = [path.name for path in base.parent.iterdir()] if base.parent.is_dir() else []
        near = difflib.get_close_matches(base.name, siblings, n=3)
        hint = f"; nearest: {', '.join(near)}" if near else "; a bucket is written s3://BUCKET/PREFIX"
        raise SourceError(f"source {source} does not exist{hint}")
    if base.is_file():
        yield SourceFile(base.name, str(base), base.stat().st_size, local_etag(base.stat()))
        return
    yield from _walk(str(base), "", os.path.realpath(base), {os.path.realpath(base)}, ignored)


def _walk(folder: str, prefix: str, base: str, above: set[str], ignored: Counter[str]) -> Iterator[SourceFile]:
    """A link into the source is a second name of a file that is listed anyway; a link out of it is followed."""
    try:
        # As the paths below them are sorted: "a-b" stands before "a/".
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name + "/" * _is_folder(entry))
    except OSError as error:
        raise SourceError(f"cannot list {folder}: {error.strerror}; check its permissions") from None
    for entry in entries:
        path = prefix + entry.name
        if is_hidden(entry.name):
            ignored["hidden"] += sum(1 for _ in _files_below(entry))
            continue
        if entry.is_symlink():
            if not os.path.exists(entry.path):  # noqa: PTH110  Path.exists fails where a folder above may not be read
                ignored["broken_symlink"] += 1
                continue
            if os.path.commonpath([base, os.path.realpath(entry.path)]) == base:
                ignored["symlink"] += 1
                continue
        if _is_folder(entry):
            real = os.path.realpath(entry.path)
            if real not in above:  # A link to a folder that leads back here would never end.
                yield from _walk(entry.path, path + "/", base, above | {real}, ignored)
        elif entry.is_file():
            try:
                status = entry.stat()
            except FileNotFoundError:
                raise SourceError(
                    f"{entry.path} went away while {base} was listed; run the same command again"
                ) from None
            yield SourceFile(path, entry.path, status.st_size, local_etag(status))
        else:
            ignored["device"] += 1


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link that leads round in a circle, or to where nobody may look.
        return False


def _files_below(entry: os.DirEntry[str]) -> Iterator[str]:
    if not entry.is_dir(follow_symlinks=False):
        yield entry.path
        return
    for _, _, names in os.walk(entry.path):
        yield from names


def listing_digest(kind: str, files: Iterable[SourceFile]) -> str:
    total = hashlib.sha256(kind.encode())
    for file in files:
        total.update(f"\n{file.path}\0{file.size}\0{file.etag}".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
