"""WebDataset tars of others as a source: what samples they hold, read in order. Nothing is ever unpacked to disk.

Members that share their name up to the first dot are one sample: an image and its label in .cls or .json.
"""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from pipelines import store
from pipelines.corpus.entries import Entries
from pipelines.corpus.errors import SourceError
from pipelines.corpus.fetch import read_listed
from pipelines.corpus.labels import LABEL_BYTES, Label, is_text, read_any_label
from pipelines.corpus.listing import SourceFile, check_names
from pipelines.corpus.members import IMAGE_EXTENSIONS
from pipelines.corpus.parallel import map_items
from pipelines.corpus.quarantine import Rejected
from pipelines.corpus.ranged import RangedFile
from pipelines.corpus.sources import SPLIT_NAMES, split_from_name

__all__ = ["tar_entries"]

log = logging.getLogger(__name__)
IMAGES = (*IMAGE_EXTENSIONS, "gif", "bmp", "tif", "tiff")  # The others are told from what is no image.
LONGEST_READ = LABEL_BYTES + 1024
SPARSE = "GNU.sparse"  # Of a sparse file that tarfile does not know for one it takes the size that the header says.
LEAVES = "leaves the archive"
BLOCK = 512
COLUMNS = ("path", "uri", "offset", "size", "etag", "split", "label")
FEWEST_TARS = 8  # With fewer it is not worth while to ask the cluster.
BUFFER = 8 << 20  # One ranged request; headers of small samples lie close together.


def tar_entries(files: Sequence[SourceFile], num_workers: int | None = 0) -> Entries:
    """Pass one over the tars: which image lies where. On any CPU of the cluster unless `num_workers` is 0."""
    entries = Entries()
    tars = [file for file in files if file.path.endswith(".tar")]
    check_names(tars)
    entries.ignored["other"] = len(files) - len(tars)
    for tar, part in zip(tars, _scanned(tars, num_workers), strict=True):
        labels = [tuple(label) if isinstance(label, list) else label for label in part["label"]]
        kinds = {isinstance(label, tuple) for label in labels}
        if kinds and not len(entries):
            entries.multi_label = True in kinds
        if kinds - {entries.multi_label}:
            raise SourceError(
                f"{tar.uri} has samples with one label where others of the source have a list, or a list where they"
                " have one; use the same in all"
            )
        for row in zip(*(part[name] for name in COLUMNS[:-1]), labels, strict=True):
            entries.add(*row)
        entries.rejected += [Rejected(**item) for item in part["rejected"]]
        entries.ignored.update(part["ignored"])
    entries.ignored += type(entries.ignored)()  # Drops zeros.
    return entries


def _scanned(tars: Sequence[SourceFile], num_workers: int | None) -> Iterator[Mapping[str, Any]]:
    """What each tar holds, in the order of the tars."""
    items = [asdict(tar) for tar in tars]
    if num_workers == 0 or len(items) < FEWEST_TARS:
        with ThreadPoolExecutor(8) as pool:
            yield from pool.map(_scan, items)
        return
    yield from (part for _, part in sorted(map_items(_scan, items, num_workers=num_workers), key=lambda done: done[0]))


def _scan(item: Mapping[str, Any]) -> dict[str, Any]:
    found = _one_tar(SourceFile(**item))
    columns = {name: list(getattr(found, name)) for name in COLUMNS}
    return columns | {"rejected": [asdict(one) for one in found.rejected], "ignored": dict(found.ignored)}


def _one_tar(file: SourceFile) -> Entries:
    entries = Entries()
    folder, _, name = file.path.rpartition("/")
    split = SPLIT_NAMES.get(folder.split("/")[0].lower()) or split_from_name(name)
    sample: dict[str, tarfile.TarInfo] = {}
    prefix: str | None = None
    try:
        ranged = RangedFile(file.size, lambda start, length: read_listed(file.uri, file.etag, start, length))
        # Of a local file the headers alone are read; in a bucket a request costs more than the bytes between them.
        raw = _Capped(ranged, BUFFER if store.is_s3(file.uri) else 2 * BLOCK)
        with tarfile.open(fileobj=raw, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # tarfile keeps every member it has seen
                if member.isdir():
                    continue
                if (
                    not member.isreg()
                    or member.issparse()
                    or any(name.startswith(SPARSE) for name in member.pax_headers)
                ):
                    entries.ignored["tar_link_or_device"] += 1
                    continue
                if problem := _name_problem(member.name):
                    if member.name.rpartition(".")[2].lower() in IMAGES:
                        entries.reject(f"{file.path}/{member.name}", split, "bad_name", f"the member name {problem}")
                    else:
                        entries.ignored["tar_member_outside" if problem == LEAVES else "tar_member_not_utf8"] += 1
                    continue
                own, _, extension = _cut(member.name)
                if own != prefix:
                    _add_sample(entries, file, tar, split, prefix, sample)
                    prefix, sample = own, {}
                if extension.lower() in sample:
                    raise SourceError(f"{file.uri}: two members {member.name!r}; repair the tar")
                sample[extension.lower()] = member
            _add_sample(entries, file, tar, split, prefix, sample)
            _check_end(file, raw, tar.offset, entries)
    except (tarfile.TarError, EOFError) as error:
        raise SourceError(f"{file.uri} is a damaged tar ({error}); repair it or take it out of the source") from None
    return entries


def _cut(name: str) -> tuple[str, str, str]:
    """WebDataset's rule: the key ends at the first dot after the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return f"{folder}{slash}{stem}", dot, extension


def _name_problem(name: str) -> str:
    if not is_text(name):
        return "is not UTF-8"
    return LEAVES if name.startswith("/") or ".." in name.split("/")[:-1] else ""


class _Capped(io.BufferedReader):
    """tarfile reads a header extension whole, however long it says it is."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > LONGEST_READ:
            raise tarfile.ReadError(f"a header extension of {size:,} bytes")
        return super().read(size)


def _check_end(file: SourceFile, raw: io.BufferedIOBase, position: int, entries: Entries) -> None:
    """tarfile takes a broken header for the end of the archive: hundreds of images would be lost without a word."""
    raw.seek(position)
    block = raw.read(BLOCK)
    if block.strip(b"\0"):
        raise SourceError(f"{file.uri}: broken tar header at byte {position:,}; repair it or take it out of the source")
    if not block:
        log.warning("%s has no end-of-archive mark: it may have been cut short", file.uri)
        entries.ignored["tar_without_end_mark"] += 1


def _add_sample(
    entries: Entries,
    file: SourceFile,
    tar: tarfile.TarFile,
    split: str | None,
    prefix: str | None,
    sample: dict[str, tarfile.TarInfo],
) -> None:
    if prefix is None:
        return
    extension = next((name for name in IMAGES if name in sample), None)
    if extension is None:
        entries.reject(f"{file.path}/{prefix}", split, "missing_image", f"members: {', '.join(sorted(sample))}")
        return
    image = sample[extension]
    path = f"{file.path}/{prefix}.{extension}"
    label = _label(tar, sample)
    if label is None:
        entries.reject(path, split, "missing_label", "no usable .cls or .json beside the image")
    else:
        entries.add(path, file.uri, image.offset_data, image.size, file.etag, split, label)
    for name in sample.keys() - {extension, "cls", "json"}:
        entries.ignored[f"tar_member_{name}"] += 1


def _label(tar: tarfile.TarFile, sample: Mapping[str, tarfile.TarInfo]) -> Label | None:
    """KEY.json is not read where KEY.cls says it."""
    label = read_any_label(_content(tar, sample.get("cls")), None)
    return read_any_label(None, _content(tar, sample.get("json"))) if label is None else label


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> bytes | None:
    stream = tar.extractfile(member) if member is not None and member.size <= LABEL_BYTES else None
    return stream.read() if stream is not None else None
