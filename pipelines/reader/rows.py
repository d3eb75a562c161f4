"""What one piece of reading work is and gives: an item in, decoded rows of one lane out.

Both backends run `read_item`, so their pixels are the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.reader.augment import AugmentConfig
from pipelines.reader.decode import decode_for_evaluation, decode_for_training
from pipelines.reader.engines import Engine, require
from pipelines.reader.fetch import PageSpan, fetch
from pipelines.reader.order import permutation
from pipelines.reader.tar import TarSample, walk

if TYPE_CHECKING:
    from vit_model.preprocess import InputSpec

__all__ = ["IMAGE_EXTENSIONS", "Item", "Job", "Rows", "SampleError", "read_item"]

IMAGE_EXTENSIONS = ("jpg", "png", "webp", "jpeg")
LABEL_EXTENSION = "cls"
ROWS_TOGETHER = 512  # Rows of one piece at most; enough to make the cost per piece vanish for tiny images.
PIECE_BYTES = 8 << 20  # Decoded bytes of one piece at most: bounds memory, and a first batch comes soon.


class SampleError(RuntimeError):
    """A sample is bad and the policy is to stop."""


@dataclass(frozen=True, slots=True)
class Job:
    """What all items of a stream share."""

    seed: int
    spec: InputSpec
    augment: AugmentConfig | None  # None: the evaluation path.
    num_classes: int
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
    """Decoded rows k, k + 1, ... of one lane. A bad row has weight 0, a black image and a fault."""

    lane: int
    k: int
    images: NDArray[np.uint8]  # (n, C, H, W)
    labels: NDArray[np.int64]
    weights: NDArray[np.float32]
    sample_ids: NDArray[np.int64]
    faults: list[str]  # "" or "reason: shard, key, what is wrong"
    num_pages: int = 0  # Fetched for these rows.
    num_bytes: int = 0
    cpu_seconds: float = 0.0

    def __len__(self) -> int:
        return len(self.sample_ids)


NOTHING = memoryview(b"")


@dataclass(slots=True)
class _Sample:
    """One row to come: where its bytes are, and what is already known to be wrong with it."""

    image: memoryview = NOTHING
    label: int = 0
    key: str = ""
    uri: str = ""
    fault: str = ""


def read_item(job: Job, item: Item) -> Iterator[Rows]:
    """Fetch the window's pages, walk them, and decode the rows still to come, a few megabytes at a time."""
    started = time.thread_time()
    if job.engine is not None:
        require(job.engine.name, job.engine.pixels)
    pages = fetch(item.pages)
    samples: list[_Sample] = []
    ids: list[NDArray[np.int64]] = []
    for span, page in zip(item.pages, pages, strict=True):
        samples += _samples(span, page, job.num_classes)[span.first : span.last]
        ids.append(np.arange(span.first_id + span.first, span.first_id + span.last, dtype=np.int64))
    sample_ids = np.concatenate(ids)
    order = (
        permutation(job.seed, item.epoch, item.lane, item.window, len(samples))
        if item.is_shuffled
        else np.arange(len(samples))
    )[item.skip : item.skip + item.count]
    num_pages, num_bytes = len(pages), sum(map(len, pages))
    together = max(1, min(ROWS_TOGETHER, PIECE_BYTES // job.image_bytes))
    for start in range(0, len(order), together):
        part = order[start : start + together]
        rows = _decode(job, item, item.k + start, [samples[i] for i in part], sample_ids[part])
        rows.num_pages, rows.num_bytes = num_pages, num_bytes
        rows.cpu_seconds = time.thread_time() - started
        yield rows
        num_pages = num_bytes = 0
        started = time.thread_time()


def _decode(job: Job, item: Item, k: int, samples: list[_Sample], sample_ids: NDArray[np.int64]) -> Rows:
    places = np.array([i for i, sample in enumerate(samples) if not sample.fault], np.int64)
    data = [samples[i].image for i in places]
    images = np.zeros((len(samples), *job.shape), np.uint8)
    if job.augment is None:
        faults = decode_for_evaluation(data, places, job.spec, images)
    else:
        faults = decode_for_training(
            data,
            places,
            sample_ids[places],
            spec=job.spec,
            augment=job.augment,
            seed=job.seed,
            epoch=item.epoch,
            out=images,
            engine=job.engine.name if job.engine else "wheels",
        )
    texts = [sample.fault for sample in samples]
    for i, (reason, text) in faults.items():
        texts[i] = f"{reason}: {samples[i].uri}, sample {samples[i].key}: {text}"
        images[i] = 0
    bad = [text for text in texts if text]
    if bad and job.on_bad == "fail":
        raise SampleError(f"{bad[0]}; set on_bad=mask to go on without bad samples")
    return Rows(
        lane=item.lane,
        k=k,
        images=images,
        labels=np.array([sample.label for sample in samples], np.int64),
        weights=np.array([not text for text in texts], np.float32),
        sample_ids=sample_ids,
        faults=texts,
    )


def _samples(span: PageSpan, page: memoryview, num_classes: int) -> list[_Sample]:
    """One entry for each row of the page, whatever its state."""
    found, problem = walk(page)
    samples = [_sample(sample, page, span.uri, num_classes) for sample in found]
    if len(samples) > span.num_rows or (problem is None and len(samples) < span.num_rows):
        raise SampleError(
            f"{span.uri}: the page at byte {span.offset:,} holds {len(samples)} samples, the manifest says "
            f"{span.num_rows}; the shard is not the manifest's: restore it or index it again"
        )
    if problem is not None:
        fault = f"{problem.reason}: {span.uri}, page at byte {span.offset:,}: {problem}"
        samples += [_Sample(uri=span.uri, fault=fault) for _ in range(span.num_rows - len(samples))]
    return samples


def _sample(found: TarSample, page: memoryview, uri: str, num_classes: int) -> _Sample:
    sample = _Sample(key=found.key, uri=uri)
    for extension in IMAGE_EXTENSIONS:
        image = found.members.get(extension)
        if image is not None:
            sample.image = page[image[0] : image[0] + image[1]]
            break
    else:
        sample.fault = f"missing_image: {uri}, sample {found.key} has members {sorted(found.members)}"
        return sample
    label = found.members.get(LABEL_EXTENSION)
    text = bytes(page[label[0] : label[0] + label[1]]) if label else b""
    if text.isdigit() and int(text) < num_classes:
        sample.label = int(text)
    else:
        reason = "bad_label" if label else "missing_label"
        sample.fault = f"{reason}: {uri}, sample {found.key}: {text[:20]!r} of {num_classes} classes"
    return sample
