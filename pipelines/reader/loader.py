"""The door of the reader: batches of a corpus in exact order, for training and for evaluation.

Usable in a Ray Train worker, in a plain script, and without Ray (`ReaderConfig(backend="local")`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipelines.config import Strict, check_literals, how
from pipelines.reader import order as law
from pipelines.reader.assemble import RowSource
from pipelines.reader.augment import AugmentConfig
from pipelines.reader.cache import PageCache
from pipelines.reader.device import DeviceBatches
from pipelines.reader.engines import Wanted, choose
from pipelines.reader.fetch import CacheConfig, PageSpan
from pipelines.reader.levels import changes_of
from pipelines.reader.order import Order, OrderError, PageRows, Window, lanes_of_rank
from pipelines.reader.rows import FetchJob, Item, Job
from pipelines.reader.selection import label_sources
from pipelines.reader.stream import BatchStream, ReaderStats

if TYPE_CHECKING:
    from pipelines.corpus.manifest import Corpus, Pages
    from vit_model.preprocess import InputSpec

__all__ = [
    "WINDOW_PAGES",
    "AugmentConfig",
    "BatchStream",
    "DeviceBatches",
    "ReaderConfig",
    "ReaderStats",
    "changes_of",
    "choose_lanes",
    "eval_batches",
    "train_batches",
]

WINDOW_PAGES = 4  # G of the order law, for a run that starts; a checkpoint keeps its own.


CACHE_BYTES, FEWEST_CACHE_BYTES = 100_000_000_000, 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ReaderConfig(Strict):
    """How images are read. Only `on_bad` and `nvjpeg` change what is read: engines whose pixels differ are refused."""

    backend: Literal["ray", "local"] = how(default="ray")  # ray: any CPU of the cluster; local: threads of this process
    engine: Literal["auto", "wheels", "native"] = how(default="auto")  # Decoder; auto: native where it was built
    nvjpeg: bool = False  # JPEGs on the GPU that trains, by torchvision; other pixels than the other engines have
    on_bad: Literal["mask", "fail"] = "mask"  # A bad image: weight 0 and counted, or an error
    max_bad_fraction: float = how(default=0.05)  # mask: more bad images than this stop the run
    num_cpus: float = how(default=1.0)  # ray: CPU share of one read task; below 1 on small machines
    decode: Literal["auto", "tasks", "here"] = how(
        default="auto"
    )  # ray: in the read tasks, or on threads of the process that trains; auto: docs/reader.md says when
    num_threads: int | None = how(default=None)  # Decoding threads of a process that trains; null: its share of CPUs
    ahead: int = how(default=2)  # Steps that are made before they are asked for
    cache: str | None = how(default=None)  # Folder on each reading node that keeps pages between epochs; null: none
    cache_bytes: int = how(default=CACHE_BYTES)  # Most that a node keeps there

    def __post_init__(self) -> None:
        check_literals(self)
        if self.num_cpus <= 0 or (self.num_threads is not None and self.num_threads < 1):
            raise ValueError(
                f"num_cpus={self.num_cpus}, num_threads={self.num_threads}: reading needs more than 0 and at least 1"
            )
        if self.ahead < 1:
            raise ValueError(f"ahead={self.ahead}: at least the step that is asked for must be made; 2 is usual")
        if self.backend == "local" and self.decode == "tasks":
            raise ValueError("decode=tasks has no effect with backend=local, which has no tasks; remove one")
        if self.nvjpeg and (self.engine != "auto" or self.decode == "tasks"):
            raise ValueError(
                f"nvjpeg decodes in the process that trains; engine={self.engine} and decode={self.decode} ask for "
                "something else: leave both at auto"
            )
        if self.cache is not None and not self.cache.strip():
            raise ValueError(f"cache={self.cache!r} names no folder; give one, or null for no cache")
        if self.cache is None and self.cache_bytes != CACHE_BYTES:
            raise ValueError(f"cache_bytes={self.cache_bytes} has no effect without cache; set cache to a folder")
        if self.cache_bytes < FEWEST_CACHE_BYTES:
            raise ValueError(
                f"cache_bytes={self.cache_bytes} holds no page; give at least {FEWEST_CACHE_BYTES:,}, or no cache"
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction={self.max_bad_fraction} is not a fraction from 0 to 1")

    @property
    def wanted_engine(self) -> Wanted:
        return "nvjpeg" if self.nvjpeg else self.engine


def choose_lanes(pages: Pages, batch_size: int, max_workers: int | None = None, lanes: int | None = None) -> int:
    """Lanes for a run: fixed at its start and kept in the checkpoint, so that it may resume on other worker counts."""
    return law.choose_lanes(len(pages), batch_size, max_workers, lanes)


def train_batches(
    corpus: Corpus,
    *,
    split: str = "train",
    batch_size: int,
    seed: int,
    spec: InputSpec,
    augment: AugmentConfig,
    rank: int = 0,
    world_size: int = 1,
    start_step: int = 0,
    total_steps: int,
    lanes: int | None = None,
    window_pages: int = WINDOW_PAGES,
    max_workers: int | None = None,
    reader: ReaderConfig | None = None,
    pinned: bool = False,
) -> BatchStream:
    """This rank's part of each step from start_step to total_steps; batch_size counts all ranks.

    `pinned`: images in page-locked memory, from which a GPU copies by itself. `DeviceBatches` takes it from there.
    """
    reader = reader or ReaderConfig()
    pages = corpus.pages(split)
    lanes = choose_lanes(pages, batch_size, max_workers, lanes)
    law.check_lanes(lanes, batch_size, world_size)
    if not 0 <= start_step <= total_steps:
        raise OrderError(f"start_step={start_step} is outside 0..total_steps={total_steps}")
    order = Order(pages.rows, seed=seed, lanes=lanes, batch_size=batch_size, window_pages=window_pages)
    mine = lanes_of_rank(lanes, rank, world_size)
    locate = _Pages(corpus, pages)
    items = (locate.item(window) for window in order.windows(mine, start_step, total_steps))
    job = Job(_fetch_job(corpus, seed, reader), spec, augment, reader.on_bad, choose(reader.wanted_engine))
    return _stream(
        reader,
        job,
        items,
        mine,
        world_size,
        rows_per_lane=order.rows_per_step,
        start_step=start_step,
        stop_step=total_steps,
        pinned=pinned,
    )


def eval_batches(
    corpus: Corpus,
    *,
    split: str,
    batch_size: int,
    spec: InputSpec,
    rank: int = 0,
    world_size: int = 1,
    reader: ReaderConfig | None = None,
    pinned: bool = False,
) -> BatchStream:
    """Every sample exactly once, in manifest order: a contiguous slice per rank, padded with weight 0.

    All ranks give the same number of batches of batch_size / world_size rows.
    """
    reader = reader or ReaderConfig()
    lanes_of_rank(world_size, rank, world_size)
    if batch_size < 1 or batch_size % world_size:
        raise OrderError(f"batch_size={batch_size} is not divisible by {world_size} workers; use a multiple")
    pages = corpus.pages(split)
    ends = np.cumsum(pages.rows, dtype=np.int64)
    total = int(ends[-1])
    begin, end = rank * total // world_size, (rank + 1) * total // world_size
    size = batch_size // world_size
    longest = -(-total // world_size)
    locate = _Pages(corpus, pages)
    job = Job(_fetch_job(corpus, 0, reader), spec, None, reader.on_bad)
    return _stream(
        reader,
        job,
        locate.slice(ends, begin, end),
        [0],
        world_size,
        rows_per_lane=size,
        start_step=0,
        stop_step=-(-longest // size),
        num_rows=end - begin,
        pinned=pinned,
    )


def _fetch_job(corpus: Corpus, seed: int, reader: ReaderConfig) -> FetchJob:
    cache = CacheConfig(reader.cache, reader.cache_bytes) if reader.cache is not None else None
    if cache is not None:
        PageCache(cache.folder, cache.max_bytes)  # A wrong folder is told at the start; another node does without it.
    multi_label = corpus.head.multi_label
    return FetchJob(seed, len(corpus.class_names), corpus.reference, label_sources(corpus), cache, multi_label)


def _stream(
    reader: ReaderConfig, job: Job, items: Iterator[Item], lanes: Sequence[int], world_size: int, **steps: Any
) -> BatchStream:
    rows: RowSource
    if reader.backend == "local":
        from pipelines.reader.threads import read_in_threads

        rows, decodes_here = read_in_threads(job.fetch, items), True
    else:
        from pipelines.reader.executions import RayRows
        from pipelines.reader.executions import decodes_here as chosen

        needs_gpu = job.engine is not None and job.engine.name == "nvjpeg"
        decodes_here = needs_gpu or (chosen(job) if reader.decode == "auto" else reader.decode == "here")
        rows = RayRows(job, items, reader.num_cpus, world_size, decode=not decodes_here)
    return BatchStream(
        rows,
        lanes,
        job.shape,
        job=job if decodes_here else None,
        num_threads=reader.num_threads or max(1, (os.cpu_count() or 1) // world_size),
        ahead=reader.ahead,
        max_bad_fraction=reader.max_bad_fraction,
        multi_label=job.fetch.multi_label,
        **steps,
    )


class _Pages:
    """Where the pages of a split lie."""

    def __init__(self, corpus: Corpus, pages: Pages) -> None:
        self._corpus, self._pages = corpus, pages
        self._layout = corpus.layout

    def span(self, rows: PageRows) -> PageSpan:
        page, layout = self._pages[rows.page], self._layout
        return PageSpan(
            uri=self._corpus.shard_uri(page.shard),
            shard_bytes=int(layout.bytes[page.shard]),
            offset=page.offset,
            length=page.length,
            num_rows=page.tar_rows,
            first_id=page.first_row,
            first=rows.first,
            last=rows.last,
            chosen=page.chosen,
            source=-1 if layout.source is None else int(layout.source[page.shard]),
        )

    def item(self, window: Window) -> Item:
        return Item(
            lane=window.lane,
            epoch=window.epoch,
            window=window.number,
            k=window.k,
            skip=window.skip,
            count=window.count,
            is_shuffled=True,
            pages=tuple(self.span(rows) for rows in window.pages),
        )

    def slice(self, ends: np.ndarray, begin: int, end: int) -> Iterator[Item]:
        """Rows [begin, end) of the split in manifest order, one page an item."""
        k = 0
        page = int(np.searchsorted(ends, begin, side="right"))
        while begin < end:
            start = int(ends[page]) - int(self._pages.rows[page])
            first, last = begin - start, min(end, int(ends[page])) - start
            span = self.span(PageRows(page, first, last))
            yield Item(0, 0, page, k, 0, last - first, False, (span,))
            k += last - first
            begin, page = start + last, page + 1
