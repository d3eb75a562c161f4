"""Which images form step s: a pure function of (corpus digest, seed, lanes, batch size), at any number of workers.

No I/O and no state: a resume is an integer. The law stands in docs/reader.md.
N rows of the split, P pages, L lanes, B batch_size, b = B / L rows a lane gives to a step, G pages per window.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["Order", "OrderError", "PageRows", "Window", "choose_lanes", "lanes_of_rank", "permutation"]

MAX_LANES = 64
PAGES_PER_LANE = 20  # Every lane border splits a page, which is then fetched twice: 1 in 20 keeps that below 5 %.
EPOCHS_KEPT = 3  # Lanes differ in length by one row, so around an epoch's end some stand in e and some in e + 1.

BLOCK = 256  # Pages whose rows are added up when one of them is looked for.
SUMMED_TOGETHER = BLOCK << 12  # Pages, so that planning needs little memory beside its result.

# Purposes keep the random streams of one seed apart.
PAGES_PURPOSE, WINDOW_PURPOSE = 0, 1


class OrderError(ValueError):
    """No order exists for these numbers, or a stream left the order."""


@dataclass(frozen=True, slots=True)
class PageRows:
    """Rows [first, last) of one page of the split."""

    page: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Window:
    """Work of one lane: rows [skip, skip + count) of a window's permutation, which are tape positions k, k + 1, ..."""

    lane: int
    epoch: int
    number: int
    k: int
    skip: int
    count: int
    pages: tuple[PageRows, ...]

    @property
    def num_rows(self) -> int:
        """Rows of the whole window, before `skip` and `count` cut it."""
        return sum(span.last - span.first for span in self.pages)


def choose_lanes(num_pages: int, batch_size: int, max_workers: int | None = None, lanes: int | None = None) -> int:
    """L: the given one, or the largest power of two that divides B, leaves b >= 2, and splits few pages."""
    least = max_workers or 1
    if least < 1 or batch_size < 1 or num_pages < 1:
        raise OrderError(f"pages={num_pages}, batch_size={batch_size}, max_workers={least}: each must be at least 1")
    if lanes is not None:
        check_lanes(lanes, batch_size, least)
        return lanes
    powers = [1 << i for i in range(MAX_LANES.bit_length()) if batch_size % (1 << i) == 0 and batch_size >= 2 << i]
    able = [lanes for lanes in powers if lanes >= least]
    if not able:
        most = max(powers, default=0)
        raise OrderError(
            f"batch_size={batch_size} cannot feed {least} workers: every worker needs a lane, the lanes must divide "
            f"the batch, and each lane gives at least 2 images a step (at most {most} lanes here)"
            f"; use a batch_size that is a multiple of {2 * _power_at_least(least)}, or fewer workers"
        )
    sparing = [lanes for lanes in able if lanes * PAGES_PER_LANE <= num_pages]
    return max(sparing, default=min(able))


def check_lanes(lanes: int, batch_size: int, world_size: int) -> None:
    """Refuse lanes that cannot carry this batch or this many workers."""
    if lanes < 1 or batch_size % lanes:
        raise OrderError(
            f"lanes={lanes} does not divide batch_size={batch_size}; use a divisor, such as a power of two"
        )
    if lanes * 2 > batch_size:
        raise OrderError(
            f"lanes={lanes} leaves fewer than 2 of batch_size={batch_size} images to a lane"
            f"; use at most {batch_size // 2} lanes"
        )
    if world_size > lanes:
        raise OrderError(
            f"{world_size} workers share {lanes} lanes, and a worker without a lane would have no images"
            f"; set lanes or max_workers to at least {world_size} before the run starts (lanes are fixed for a run)"
        )


def lanes_of_rank(lanes: int, rank: int, world_size: int) -> range:
    """The lanes that rank r of W takes: l % W == r."""
    if world_size < 1:
        raise OrderError(f"world_size={world_size}: at least one worker reads")
    if not 0 <= rank < world_size:
        raise OrderError(f"rank={rank} is outside 0..{world_size - 1}")
    return range(rank, lanes, world_size)


class Order:
    """The order law over one split: pages of `rows_per_page` rows, numbered in manifest order."""

    def __init__(
        self, rows_per_page: NDArray[np.integer], *, seed: int, lanes: int, batch_size: int, window_pages: int
    ) -> None:
        check_lanes(lanes, batch_size, 1)
        if seed < 0:
            raise OrderError(f"seed={seed} must not be negative")
        if window_pages < 1:
            raise OrderError(f"window_pages={window_pages} must be at least 1")
        if len(rows_per_page) and int(rows_per_page.min()) < 1:
            raise OrderError(f"page {int(rows_per_page.argmin())} has no rows; every page of a manifest has at least 1")
        self.rows_per_page = rows_per_page
        self.num_pages = len(rows_per_page)
        self.num_rows = int(rows_per_page.sum(dtype=np.int64))
        self.seed, self.lanes, self.batch_size, self.window_pages = seed, lanes, batch_size, window_pages
        self.rows_per_step = batch_size // lanes
        if self.num_rows < lanes:
            raise OrderError(f"{self.num_rows} images cannot fill {lanes} lanes; use at most {self.num_rows} lanes")
        self._epoch = lru_cache(maxsize=EPOCHS_KEPT)(self._plan_epoch)

    def cut(self, lane: int) -> int:
        """First row of a lane in every epoch's row order; cut(L) = N."""
        share, rest = divmod(self.num_rows, self.lanes)
        return lane * share + min(lane, rest)

    def lane_rows(self, lane: int) -> int:
        """len(l): rows of a lane in each epoch."""
        return self.cut(lane + 1) - self.cut(lane)

    def _plan_epoch(self, epoch: int) -> _Epoch:
        order = np.arange(self.num_pages, dtype=np.int32)
        generator(self.seed, PAGES_PURPOSE, epoch).shuffle(order)  # = permutation(P), at half its memory
        return _Epoch(order, self.rows_per_page)

    def windows_of_lane(self, lane: int, start: int, stop: int) -> Iterator[Window]:
        """The windows that hold tape positions [start, stop) of a lane; earlier epochs are not walked."""
        length, begin, end = self.lane_rows(lane), self.cut(lane), self.cut(lane + 1)
        k = start
        while k < stop:
            epoch, position = divmod(k, length)
            plan = self._epoch(epoch)
            first_page = plan.place_of(begin)
            number = (plan.place_of(begin + position) - first_page) // self.window_pages
            low = first_page + number * self.window_pages
            high = min(low + self.window_pages, plan.place_of(end - 1) + 1)
            pages, ends = plan.pages(low, high)
            begins = ends - self.rows_per_page[pages]
            spans = tuple(
                PageRows(page, max(begin, page_begin) - page_begin, min(end, page_end) - page_begin)
                for page, page_begin, page_end in zip(pages.tolist(), begins.tolist(), ends.tolist(), strict=True)
            )
            skip = position - (max(begin, int(begins[0])) - begin)
            count = min(min(end, int(ends[-1])) - begin - position, stop - k)
            yield Window(lane, epoch, number, k, skip, count, spans)
            k += count

    def windows(self, lanes: Iterable[int], start_step: int, stop_step: int) -> Iterator[Window]:
        """Work for steps [start, stop) in the order in which steps need it: by first step, then by lane."""
        b = self.rows_per_step
        streams = [self.windows_of_lane(lane, start_step * b, stop_step * b) for lane in lanes]
        return heapq.merge(*streams, key=lambda window: (window.k // b, window.lane))

    def rows_of_window(self, window: Window) -> NDArray[np.int64]:
        """Row numbers in the split (manifest order) of a window's work, in tape order."""
        rows = np.concatenate([self._first_rows[span.page] + np.arange(span.first, span.last) for span in window.pages])
        order = permutation(self.seed, window.epoch, window.lane, window.number, window.num_rows)
        return np.asarray(rows[order[window.skip : window.skip + window.count]])

    @property
    def _first_rows(self) -> NDArray[np.int64]:
        return np.cumsum(self.rows_per_page, dtype=np.int64) - self.rows_per_page

    def step_rows(self, step: int, lanes: Iterable[int] | None = None) -> NDArray[np.int64]:
        """Row numbers in the split of one step, lane by lane; for tests and tools, the reader goes by windows."""
        chosen = range(self.lanes) if lanes is None else lanes
        b = self.rows_per_step
        parts = [
            self.rows_of_window(window)
            for lane in chosen
            for window in self.windows_of_lane(lane, step * b, step * b + b)
        ]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)


class _Epoch:
    """Page order of an epoch, laid end to end. 4 bytes a page: the rows before a page are summed block by block."""

    def __init__(self, order: NDArray[np.int32], rows_per_page: NDArray[np.integer]) -> None:
        self._order, self._rows = order, rows_per_page
        sums = np.empty(-(-len(order) // BLOCK) + 1, np.int64)
        sums[0] = 0
        for start in range(0, len(order), SUMMED_TOGETHER):
            rows = rows_per_page[order[start : start + SUMMED_TOGETHER]]
            blocks = np.add.reduceat(rows, np.arange(0, len(rows), BLOCK), dtype=np.int64)
            first = start // BLOCK + 1
            sums[first : first + len(blocks)] = blocks
        self._before = np.cumsum(sums)  # Rows before each block, and all of them.

    def place_of(self, row: int) -> int:
        """Place in the order of the page that holds this row of the epoch."""
        block = int(np.searchsorted(self._before, row, side="right")) - 1
        pages = self._order[block * BLOCK : (block + 1) * BLOCK]
        ends = self._before[block] + np.cumsum(self._rows[pages], dtype=np.int64)
        return block * BLOCK + int(np.searchsorted(ends, row, side="right"))

    def pages(self, low: int, high: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Pages at places [low, high), and the row of the epoch at which each ends."""
        block = low // BLOCK
        pages = self._order[block * BLOCK : high]
        ends = self._before[block] + np.cumsum(self._rows[pages], dtype=np.int64)
        return pages[low - block * BLOCK :], ends[low - block * BLOCK :]


def permutation(seed: int, epoch: int, lane: int, number: int, num_rows: int) -> NDArray[np.int64]:
    """Order of the rows inside one window."""
    return generator(seed, WINDOW_PURPOSE, epoch, lane, number).permutation(num_rows)


def generator(*key: int) -> np.random.Generator:
    """Philox keyed by whole numbers; the golden order test notices if numpy ever changes its streams."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


def _power_at_least(number: int) -> int:
    return 1 << (number - 1).bit_length()
