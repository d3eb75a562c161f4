"""The thread that puts steps together ahead of the consumer, and the threads that decode into them.

It takes rows from a backend, checks that each is the very next one of its lane, and gives every step of a rank its own
buffer. Files are decoded straight into their places, in the order in which steps need them: nothing is copied, and
only the steps under way are held as pixels.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.reader.buffers import Buffers
from pipelines.reader.fetch import replaced
from pipelines.reader.order import OrderError
from pipelines.reader.rows import Job, Rows, decode_into

__all__ = ["Assembler", "RowSource", "Spent", "Step"]

FEWEST_TOGETHER, MOST_TOGETHER = 16, 512  # Rows that one call decodes.
VERSIONS_KEPT = 1 << 16  # Shards whose ETag is remembered, about 300 bytes each.
JOIN_SECONDS = 30.0  # A backend that gives nothing for so long is left alone when the stream is closed.


class RowSource(Protocol):
    """What a backend gives: rows in the order of its items, until it is closed."""

    def __next__(self) -> Rows: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Spent:
    """What reading has cost so far."""

    pages: int = 0
    bytes: int = 0
    cpu_seconds: float = 0.0  # Of fetching and decoding, over all workers.


class Decoded(NamedTuple):
    """Result of one call: faults by place in the step."""

    faults: dict[int, str]
    cpu_seconds: float


@dataclass(slots=True)
class Step:
    """One step of a rank on its way: complete when all its calls are."""

    number: int
    num_rows: int  # Rows that are no padding.
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]  # (B,), or with several an image (B, W), padded with -1.
    weights: NDArray[np.float32]
    sample_ids: NDArray[np.int64]
    epochs: NDArray[np.int64]
    lanes: NDArray[np.int64]
    faults: dict[int, str] = field(default_factory=dict)  # By place.
    calls: list[Future[Decoded]] = field(default_factory=list)


class Assembler:
    """Steps [start, stop) of a rank, in order; at most `ahead` of them wait or are under way."""

    def __init__(
        self,
        rows: RowSource,
        lanes: Sequence[int],
        shape: tuple[int, int, int],
        *,
        rows_per_lane: int,
        start: int,
        stop: int,
        num_rows: int | None,
        job: Job | None,
        num_threads: int,
        ahead: int,
        pinned: bool = False,
        multi_label: bool = False,
    ) -> None:
        self.spent = Spent()
        self._rows, self._lanes, self._shape, self._job = rows, list(lanes), shape, job
        self._rows_per_lane, self._num_rows, self._multi_label = rows_per_lane, num_rows, multi_label
        self._start, self._stop = start, stop
        self._memory = Buffers(pinned=pinned)
        self._waiting: dict[int, deque[Rows]] = {lane: deque() for lane in lanes}
        self._ready = dict.fromkeys(lanes, 0)  # Rows that wait in each lane.
        self._next_k = dict.fromkeys(lanes, start * rows_per_lane)  # Position that must come next.
        self._versions: OrderedDict[str, str] = OrderedDict()
        self._slots = threading.Semaphore(ahead)
        self._steps: queue.SimpleQueue[Step | BaseException] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._num_threads = num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="decode") if job is not None else None
        self._thread = threading.Thread(target=self._run, name="reader", daemon=True)
        self._is_started = False

    # The consumer's side --------------------------------------------------------------------------------------------

    def next(self) -> Step:
        """The next step, complete."""
        if not self._is_started:
            self._is_started = True
            self._thread.start()
        step = self._steps.get()
        if isinstance(step, BaseException):
            self._steps.put(step)
            raise step
        for call in step.calls:
            done = call.result()
            step.faults |= done.faults
            self.spent.cpu_seconds += done.cpu_seconds
        self._slots.release()
        return step

    def close(self) -> None:
        """Stop reading; workers and memory are given back."""
        self._closing.set()
        self._slots.release()
        if not self._is_started:
            self._rows.close()
        with contextlib.suppress(RuntimeError):  # Of a thread that joins itself: it may be what collects the stream.
            if self._is_started:
                self._thread.join(JOIN_SECONDS)
        with contextlib.suppress(RuntimeError):
            if self._pool is not None:
                self._pool.shutdown(wait=True, cancel_futures=True)

    # The thread -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            for number in range(self._start, self._stop):
                self._slots.acquire()
                if self._closing.is_set():
                    raise OrderError("the stream was closed")  # For another thread that may wait in `next`.
                self._steps.put(self._assemble(number))
        except BaseException as error:
            self._steps.put(error)
        finally:
            self._rows.close()
            for lane in self._waiting.values():
                lane.clear()

    def _assemble(self, number: int) -> Step:
        wanted = self._rows_per_lane
        if self._num_rows is not None:
            wanted = max(0, min(wanted, self._num_rows - number * wanted))
        while any(ready < wanted for ready in self._ready.values()):
            self._take_in(number)
            if self._closing.is_set():
                raise OrderError("the stream was closed")
        taken = [rows for lane in self._lanes for rows in self._take_out(lane, wanted)]
        size = self._rows_per_lane * len(self._lanes)
        images = self._memory.take(size * int(np.prod(self._shape))).reshape(size, *self._shape)
        step = Step(
            number,
            wanted * len(self._lanes),
            images,
            labels=self._no_labels(size, taken),
            weights=np.zeros(size, np.float32),
            sample_ids=np.full(size, -1, np.int64),
            epochs=np.zeros(size, np.int64),
            lanes=np.repeat(np.array(self._lanes, np.int64), self._rows_per_lane),
        )
        parts: list[Rows] = []
        at = 0
        for rows in taken:
            target = slice(at, at + len(rows))
            if self._multi_label:
                step.labels[target, : rows.labels.shape[1]] = rows.labels
            else:
                step.labels[target] = rows.labels
            step.weights[target] = rows.weights
            step.sample_ids[target], step.epochs[target] = rows.sample_ids, rows.epoch
            if isinstance(rows.images, list):
                parts.append(rows)
            else:
                images[target] = rows.images
                step.faults |= {at + i: fault for i, fault in enumerate(rows.faults) if fault}
            at += len(rows)
        images[at:] = 0
        if parts:
            self._decode(step, parts)
        return step

    def _no_labels(self, size: int, taken: Sequence[Rows]) -> NDArray[np.int64]:
        """Of padding; wide enough for the rows of the step."""
        if not self._multi_label:
            return np.zeros(size, np.int64)
        return np.full((size, max([1, *(rows.labels.shape[1] for rows in taken)])), -1, np.int64)

    def _take_out(self, lane: int, count: int) -> list[Rows]:
        """The next `count` rows of a lane, in as many pieces as they came."""
        waiting = self._waiting[lane]
        self._ready[lane] -= count
        taken: list[Rows] = []
        while count:
            rows = waiting.popleft()
            if len(rows) > count:
                waiting.appendleft(rows.part(count, len(rows)))
                rows = rows.part(0, count)
            taken.append(rows)
            count -= len(rows)
        return taken

    def _decode(self, step: Step, parts: list[Rows]) -> None:
        """Hand the step's files to the decoding threads, in even shares."""
        assert self._pool is not None
        total = sum(map(len, parts))
        share = -(-total // (2 * self._num_threads))
        share = max(FEWEST_TOGETHER, min(MOST_TOGETHER, share))
        at = count = 0
        together: list[Rows] = []
        for rows in _cut(parts, share):
            together.append(rows)
            count += len(rows)
            if count >= share:
                step.calls.append(self._pool.submit(self._call, together, at, step.images))
                at, count, together = at + count, 0, []
        if together:
            step.calls.append(self._pool.submit(self._call, together, at, step.images))

    def _call(self, parts: list[Rows], at: int, images: NDArray[np.uint8]) -> Decoded:
        assert self._job is not None
        started = time.thread_time()
        places = np.arange(at, at + sum(map(len, parts)))
        faults = decode_into(self._job, parts, places, images)
        return Decoded({at + i: text for i, text in faults.items()}, time.thread_time() - started)

    def _take_in(self, number: int) -> None:
        """Put the next rows into their lane's queue, if they are the very next ones."""
        rows = next(self._rows, None)  # type: ignore[call-overload]
        if rows is None:
            raise OrderError(f"reading ended before step {number} of {self._stop} was complete; please report it")
        expected = self._next_k.get(rows.lane)
        if rows.k != expected:
            raise OrderError(
                f"lane {rows.lane} gave position {rows.k} where {expected} had to come: the stream lost, repeated or "
                "reordered rows; resume from the last checkpoint, and report it"
            )
        for uri, etag in rows.versions:
            # Other processes fetch, each with its own memory: here all of it comes together.
            if self._versions.setdefault(uri, etag) != etag:
                raise replaced(uri)
            if len(self._versions) > VERSIONS_KEPT:
                self._versions.popitem(last=False)
        self._next_k[rows.lane] += len(rows)
        self._ready[rows.lane] += len(rows)
        self._waiting[rows.lane].append(rows)
        self.spent.pages += rows.num_pages
        self.spent.bytes += rows.num_bytes
        self.spent.cpu_seconds += rows.cpu_seconds


def _cut(parts: list[Rows], most: int) -> list[Rows]:
    """Pieces that add up to multiples of `most` rows, so that shares are even."""
    pieces: list[Rows] = []
    room = most
    for rows in parts:
        first = 0
        while first < len(rows):
            last = min(len(rows), first + room)
            pieces.append(rows.part(first, last))
            room = room - (last - first) or most
            first = last
    return pieces
