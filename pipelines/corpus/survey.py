"""Figures of a corpus and a few of its images, in one pass over the sample table that keeps little of it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pipelines import store
from pipelines.corpus.manifest import Corpus
from pipelines.corpus.members import IMAGE_EXTENSIONS, TarStream
from pipelines.corpus.rows import tar_rows
from pipelines.corpus.selection import present
from pipelines.corpus.tables import read_table

if TYPE_CHECKING:
    import pyarrow as pa
    from PIL import Image

__all__ = ["NEAR_BITS", "Picture", "Survey", "difference_hash", "near_pairs", "survey"]

COLUMNS = ("shard", "offset", "bytes", "width", "height", "label", "labels", "key", "source", "content")
NEAR_BITS = 4  # Of 64: pictures whose hashes differ in no more are nearly the same.
SIDES = np.array([0, 32, 64, 128, 256, 512, 1024, 2048, 4096, 1 << 31])  # Longer side, pixels.
ASPECTS = np.array([0, 1 / 3, 1 / 2, 2 / 3, 3 / 4, 0.95, 1.05, 4 / 3, 3 / 2, 2, 3, np.inf])  # Width / height.
BYTES = np.array([0, 1, 3, 10, 30, 100, 300, 1000, 3000, 1 << 40]) * 1000  # Of the sample in the tar.
THREADS = 8
FLAT_LEVELS = 48  # A small picture with less range of grey is blank: its hash would equal many.


@dataclass(slots=True)
class Picture:
    """One image of the corpus, small."""

    row: Mapping[str, Any]
    split: str
    thumbnail: bytes = b""  # JPEG; empty where the image cannot be read.
    hash: int | None = None  # None: too flat to tell pictures apart.
    problem: str = ""


@dataclass(slots=True)
class Survey:
    samples: int  # Images that come, each counted once however often it does.
    per_class: dict[str, NDArray[np.int64]]  # By split: images of each class.
    sides: NDArray[np.int64]  # Images per bin of SIDES, and so on.
    aspects: NDArray[np.int64]
    sizes: NDArray[np.int64]
    smallest: tuple[int, int] = (0, 0)  # Width and height,
    largest: tuple[int, int] = (0, 0)  # by pixels.
    sheets: dict[int, list[Picture]] = field(default_factory=dict)  # By class.
    compared: int = 0  # Images that were compared for nearness.
    near: list[tuple[Picture, Picture, int]] = field(default_factory=list)  # Pairs and the bits that differ.
    anomalies: list[dict[str, Any]] = field(default_factory=list)

    @property
    def total(self) -> NDArray[np.int64]:
        """Images of each class."""
        counts: NDArray[np.int64] = np.stack(list(self.per_class.values())).sum(axis=0)
        return counts


def survey(corpus: Corpus, *, classes: Sequence[int] | None, per_class: int, compared: int, side: int) -> Survey:
    """`classes` get a contact sheet of `per_class` images (None: all); `compared` images are looked at for nearness."""
    count = len(corpus.class_names)
    empty = [np.zeros(len(bins) - 1, np.int64) for bins in (SIDES, ASPECTS, BYTES)]
    found = Survey(0, {}, empty[0], empty[1], empty[2])
    wanted = np.ones(count, np.bool_) if classes is None else np.isin(np.arange(count), classes)
    low, high = 1 << 62, 0
    sheet, some = _Least(per_class), _Least(compared)
    row = 0
    for split in corpus.splits:
        found.per_class[split] = np.zeros(count, np.int64)
        for table in _coming(corpus, split):
            width, height = (table[name].to_numpy().astype(np.int64) for name in ("width", "height"))
            labels = table["label"].to_numpy() if "label" in table.column_names else None
            if labels is not None:
                found.per_class[split] += np.bincount(labels, minlength=count)
                first = labels
            else:
                lists = table["labels"].to_pylist()
                flat = np.array([label for own in lists for label in own], np.int64)
                found.per_class[split] += np.bincount(flat, minlength=count)
                first = np.array([own[0] if own else -1 for own in lists], np.int64)
            found.sides += np.histogram(np.maximum(width, height), SIDES)[0]
            found.aspects += np.histogram(width / np.maximum(height, 1), ASPECTS)[0]
            found.sizes += np.histogram(table["bytes"].to_numpy(), BYTES)[0]
            pixels = width * height
            for place, is_new in ((int(pixels.argmin()), True), (int(pixels.argmax()), False)):
                if is_new and pixels[place] < low:
                    low, found.smallest = int(pixels[place]), (int(width[place]), int(height[place]))
                if not is_new and pixels[place] > high:
                    high, found.largest = int(pixels[place]), (int(width[place]), int(height[place]))
            # By chance, but from the place alone: the same corpus gives the same report.
            order = np.random.Generator(np.random.Philox(row)).integers(0, 1 << 63, len(width), np.uint64)
            row += len(width)
            found.samples += len(width)
            usable = np.flatnonzero((first >= 0) & wanted[np.maximum(first, 0)])
            sheet.take(table, split, first, order, usable)
            some.take(table, split, np.zeros(len(width), np.int64), order, np.arange(len(width)))
    chosen, others = sheet.pictures(), some.pictures()
    _load(corpus, [*chosen.values(), *others.values()], side)
    found.sheets = sheet.grouped(chosen)
    found.compared = sum(not picture.problem for picture in others.values())
    found.near = near_pairs(list(others.values()))
    anomalies = store.join(corpus.beside, "anomalies.parquet")
    if store.exists(anomalies):
        found.anomalies = read_table(anomalies).to_pylist()
    return found


def _coming(corpus: Corpus, split: str) -> Iterator[pa.Table]:
    """The rows of a split without those that do not come: withdrawn images, or what a subset does not take."""
    import pyarrow as pa

    times = present(corpus, split)
    first = 0
    for table in tar_rows(corpus, split, COLUMNS):
        wanted = times[first : first + table.num_rows] > 0
        first += table.num_rows
        if wanted.any():
            yield table if wanted.all() else table.filter(pa.array(wanted))


class _Least:
    """The rows of least order in each group, kept while tables pass by."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[tuple[int, int, str, dict[str, Any]]] = []  # group, order, split, row

    def take(
        self, table: Any, split: str, group: NDArray[Any], order: NDArray[np.uint64], usable: NDArray[np.int64]
    ) -> None:
        if not self._count:
            return
        own = usable[np.lexsort((order[usable], group[usable]))]
        ranks = np.arange(len(own)) - np.searchsorted(group[own], group[own])
        own = own[ranks < self._count]
        rows = table.take(own).to_pylist()
        self._kept += zip(group[own].tolist(), order[own].tolist(), [split] * len(own), rows, strict=True)
        self._kept.sort(key=lambda one: one[:2])
        groups = np.array([one[0] for one in self._kept])
        ranks = np.arange(len(groups)) - np.searchsorted(groups, groups)
        self._kept = [one for one, rank in zip(self._kept, ranks.tolist(), strict=True) if rank < self._count]

    def pictures(self) -> dict[int, Picture]:
        return {number: Picture(row, split) for number, (_, _, split, row) in enumerate(self._kept)}

    def grouped(self, pictures: Mapping[int, Picture]) -> dict[int, list[Picture]]:
        groups: dict[int, list[Picture]] = {}
        for number, (group, _, _, _) in enumerate(self._kept):
            groups.setdefault(group, []).append(pictures[number])
        return groups


def _load(corpus: Corpus, pictures: Sequence[Picture], side: int) -> None:
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(lambda picture: _load_one(corpus, picture, side), pictures))


def _load_one(corpus: Corpus, picture: Picture, side: int) -> None:
    from PIL import Image

    from vit_model.preprocess import ImageError, decode_image

    row = picture.row
    try:
        data = store.read(corpus.shard_uri(row["shard"]), row["offset"], row["bytes"])
        pixels = decode_image(_image_in(data), 3).permute(1, 2, 0).numpy()
    except (store.StoreError, ImageError) as error:
        picture.problem = str(error)
        return
    image = Image.fromarray(pixels)
    picture.hash = difference_hash(image)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=82)
    picture.thumbnail = file.getvalue()


def _image_in(data: bytes) -> bytes:
    """The image member of one sample's bytes, as the reader chooses it; nothing if there is none."""
    stream = TarStream(lambda start, length: data[start : start + length], len(data))
    images: dict[str, bytes] = {}
    for member in stream.members():
        extension = member.name.rpartition(b"/")[2].partition(b".")[2].decode("utf-8", "replace").lower()
        if member.kind == "file" and extension in IMAGE_EXTENSIONS:
            images.setdefault(extension, stream.content(member))
    return next((images[name] for name in IMAGE_EXTENSIONS if name in images), b"")


# Nearness -------------------------------------------------------------------------------------------------------------


def difference_hash(image: Image.Image) -> int | None:
    """64 bits: in a picture of 9 x 8 grey pixels, whether each is darker than its right neighbour (dHash).

    N. Krawetz, "Kind of Like That", 2013. None for a picture so flat that noise decides the bits.
    """
    from PIL import Image as Pillow

    small = np.asarray(image.convert("L").resize((9, 8), Pillow.Resampling.BOX), np.int16)
    if int(small.max() - small.min()) < FLAT_LEVELS:
        return None
    bits = (small[:, 1:] > small[:, :-1]).ravel()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def near_pairs(pictures: Sequence[Picture]) -> list[tuple[Picture, Picture, int]]:
    """Pairs of different content whose hashes differ in at most NEAR_BITS bits, nearest first."""
    own = [picture for picture in pictures if picture.hash is not None]
    hashes = np.array([picture.hash for picture in own], np.uint64)
    pairs: list[tuple[Picture, Picture, int]] = []
    for number in range(len(own) - 1):
        apart = np.bitwise_count(hashes[number + 1 :] ^ hashes[number])
        for other in np.flatnonzero(apart <= NEAR_BITS).tolist():
            second = own[number + 1 + other]
            if second.row["content"] != own[number].row["content"]:
                pairs.append((own[number], second, int(apart[other])))
    return sorted(pairs, key=lambda pair: (pair[2], pair[0].row["source"], pair[1].row["source"]))
