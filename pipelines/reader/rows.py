"""What one piece of reading work is and gives: an item in, rows of one lane out, as files or as decoded pixels.

Both backends run the same functions on the same rows, so their pixels are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.reader.augment import AugmentConfig
from pipelines.reader.buffers import Buffers
from pipelines.reader.decode import DecoderError, Faults, decode_for_evaluation, decode_for_training
from pipelines.reader.engines import Engine, require
from pipelines.reader.fetch import CacheConfig, PageSpan, fetch
from pipelines.reader.labels import padded
from pipelines.reader.order import permutation
from pipelines.reader.pages import Sample, SampleError, samples_of_page
from pipelines.reader.selection import LabelSource, select

if TYPE_CHECKING:
    from vit_model.preprocess import InputSpec

__all__ = ["FetchJob", "Item", "Job", "Rows", "SampleError", "decode_into", "read_decoded", "read_files"]

ROWS_TOGETHER = 512  # Rows of one piece at most; enough to make the cost per piece vanish for tiny images.
PIECE_BYTES = 8 << 20  # Bytes of one piece at most: bounds memory, and a first batch comes soon.

_buffers = Buffers()


@dataclass(frozen=True, slots=True)
class FetchJob:
    """What fetching and walking needs to know. Not the model's input: a process that only fetches imports no torch."""

    seed: int
    num_classes: int
    corpus: str = ""  # Reference of the manifest: its class names, where tars name the class instead of numbering it.
    sources: tuple[LabelSource, ...] = ()  # Label spaces of the tars, where they are not the corpus' own.
    cache: CacheConfig | None = None  # Of the node that fetches.
    multi_label: bool = False  # An image has a list of labels.

    def space(self, source: int) -> LabelSource:
        """The label space in which a tar was written, and the way back from it."""
        return LabelSource(self.corpus, self.num_classes, None) if source < 0 else self.sources[source]


@dataclass(frozen=True, slots=True)
class Job:
    """What all items of a stream share."""

    fetch: FetchJob
    spec: InputSpec
    augment: AugmentConfig | None  # None: the evaluation path.
    on_bad: Literal["mask", "fail"] = "mask"
    engine: Engine | None = None  # Training: what decodes, here and on every node; None: the wheels, unchecked.

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a decoded image."""
        return self.spec.channels, self.spec.height, self.spec.width

    @property
    def image_bytes(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Item:
    """Rows [skip, skip + count) of a window, which are positions k, k + 1, ... of a lane's tape."""

    lane: int
    epoch: int
    window: int
    k: int
    skip: int
    count: int
    is_shuffled: bool  # False: manifest order.
    pages: tuple[PageSpan, ...]


@dataclass(slots=True)
class Rows:
    """Rows k, k + 1, ... of one lane. A bad row has weight 0, a black image and a fault."""

    lane: int
    k: int
    epoch: int
    images: NDArray[np.uint8] | list[memoryview]  # Decoded (n, C, H, W), or the files.
    labels: NDArray[np.int64]  # (n,), or with several an image (n, W), padded with -1.
    weights: NDArray[np.float32]
    sample_ids: NDArray[np.int64]
    faults: list[str]  # "" or "reason: shard, key, what is wrong"
    names: list[str]  # "shard, sample key" for a fault to come; decoded rows have none.
    num_pages: int = 0  # Fetched for these rows.
    num_bytes: int = 0
    cpu_seconds: float = 0.0
    versions: tuple[tuple[str, str], ...] = ()  # (URI, ETag) of the shards that were read.

    def __len__(self) -> int:
        return len(self.sample_ids)

    def part(self, first: int, last: int) -> Rows:
        """Rows [first, last), as views; what was spent on the whole is not repeated."""
        return Rows(
            self.lane,
            self.k + first,
            self.epoch,
            self.images[first:last],
            self.labels[first:last],
            self.weights[first:last],
            self.sample_ids[first:last],
            self.faults[first:last],
            self.names[first:last],
        )


def read_files(job: FetchJob, item: Item) -> Rows:
    """Fetch the window's pages and walk them: the files of the rows still to come, in tape order."""
    started = time.thread_time()
    pages = fetch(item.pages, job.cache)
    samples: list[Sample] = []
    ids: list[NDArray[np.int64]] = []
    for span, page in zip(item.pages, pages, strict=True):
        space = job.space(span.source)
        found = samples_of_page(span, page.data, space.num_classes, space.corpus, job.multi_label)
        samples += select(found, span.chosen, space.labels)[span.first : span.last]
        ids.append(np.arange(span.first_id + span.first, span.first_id + span.last, dtype=np.int64))
    order = (
        permutation(job.seed, item.epoch, item.lane, item.window, len(samples))
        if item.is_shuffled
        else np.arange(len(samples))
    )[item.skip : item.skip + item.count]
    chosen = [samples[i] for i in order]
    return Rows(
        lane=item.lane,
        k=item.k,
        epoch=item.epoch,
        images=[sample.image for sample in chosen],
        labels=_labels(chosen, job.multi_label),
        weights=np.array([not sample.fault for sample in chosen], np.float32),
        sample_ids=np.concatenate(ids)[order],
        faults=[sample.fault for sample in chosen],
        names=[sample.name for sample in chosen],
        num_pages=len(pages),
        num_bytes=sum(len(page.data) for page in pages),
        cpu_seconds=time.thread_time() - started,
        versions=tuple({span.uri: page.etag for span, page in zip(item.pages, pages, strict=True)}.items()),
    )


def _labels(samples: Sequence[Sample], multi_label: bool) -> NDArray[np.int64]:
    if multi_label:  # A bad sample has none.
        return padded([sample.label if isinstance(sample.label, tuple) else () for sample in samples])
    return np.array([sample.label for sample in samples], np.int64)


def read_decoded(job: Job, item: Item) -> Iterator[Rows]:
    """The same rows as pixels, a few megabytes at a time. Raises what `engines.require` does."""
    if job.engine is not None:
        require(job.engine.name, job.engine.pixels)
    files = read_files(job.fetch, item)
    together = max(1, min(ROWS_TOGETHER, PIECE_BYTES // job.image_bytes))
    for first in range(0, len(files), together):
        started = time.thread_time()
        rows = files.part(first, min(first + together, len(files)))
        images = _buffers.take(len(rows) * job.image_bytes).reshape(-1, *job.shape)
        for i, fault in decode_into(job, [rows], np.arange(len(rows)), images).items():
            rows.faults[i], rows.weights[i] = fault, 0.0
        rows.images, rows.names = images, []
        rows.cpu_seconds = time.thread_time() - started
        if not first:
            rows.num_pages, rows.num_bytes, rows.versions = files.num_pages, files.num_bytes, files.versions
            rows.cpu_seconds += files.cpu_seconds
        yield rows


def decode_into(
    job: Job, parts: Sequence[Rows], places: NDArray[np.int64], images: NDArray[np.uint8]
) -> dict[int, str]:
    """Decode the files of `parts`, laid end to end, into images[places]. Returns the fault of each row that is bad.

    Every named place is written: a bad row is black. Raises SampleError if the policy is to stop.
    """
    found: dict[int, str] = {}
    offset = 0
    for epoch, same in _by_epoch(parts):
        files = [file for part in same for file in part.images]
        faults = [fault for part in same for fault in part.faults]
        names = [name for part in same for name in part.names]
        good = np.array([i for i, fault in enumerate(faults) if not fault], np.int64)
        where = places[offset : offset + len(files)]
        texts = {i: fault for i, fault in enumerate(faults) if fault}
        back = {int(where[i]): int(i) for i in good}
        data = [files[i] for i in good]
        ids = np.concatenate([part.sample_ids for part in same])[good]
        try:
            new = _decode(job, data, where[good], ids, epoch, images)
        except DecoderError as error:
            raise SampleError(f"{names[back[error.place]]}: {error}; please report it, with the image") from error
        for place, (reason, text) in new.items():
            texts[back[place]] = f"{reason}: {names[back[place]]}: {text}"
        for i, text in texts.items():
            images[where[i]] = 0
            found[offset + i] = text
        offset += len(files)
    if found and job.on_bad == "fail":
        raise SampleError(f"{next(iter(found.values()))}; set on_bad=mask to go on without bad samples")
    return found


def _decode(
    job: Job,
    data: Sequence[memoryview],
    places: NDArray[np.int64],
    ids: NDArray[np.int64],
    epoch: int,
    images: NDArray[np.uint8],
) -> Faults:
    if job.augment is None:
        return decode_for_evaluation(data, places, job.spec, images)
    return decode_for_training(
        data,
        places,
        ids,
        spec=job.spec,
        augment=job.augment,
        seed=job.fetch.seed,
        epoch=epoch,
        out=images,
        engine=job.engine.name if job.engine else "wheels",
    )


def _by_epoch(parts: Sequence[Rows]) -> Iterator[tuple[int, list[Rows]]]:
    """Neighbours of one epoch: lanes differ in length by one row, so around an epoch's end two of them meet."""
    start = 0
    for end in range(1, len(parts) + 1):
        if end == len(parts) or parts[end].epoch != parts[start].epoch:
            yield parts[start].epoch, list(parts[start:end])
            start = end
