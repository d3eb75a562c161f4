"""From rows of single lanes to the batches of a rank, step after step; what leaves the order is a loud error.

A backend hands on rows in any pieces, however it slices them, as long as every lane's rows come in tape order. One
small buffer per lane keeps what later steps need.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol

import numpy as np

from pipelines.batch import Batch
from pipelines.reader.order import OrderError
from pipelines.reader.rows import Rows, SampleError

__all__ = ["BatchStream", "ReaderStats"]

log = logging.getLogger(__name__)

FAULTS_TOLD = 3  # Log lines per reason; the rest is only counted.
FEWEST_JUDGED = 1000  # The bad fraction of fewer images than these says little.


@dataclass(slots=True)
class ReaderStats:
    """What a stream has done so far; bad samples by reason."""

    images: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    pages: int = 0
    bytes: int = 0
    wait_seconds: float = 0.0  # Time in which the consumer waited for rows.
    read_cpu_seconds: float = 0.0  # CPU time of fetching and decoding, over all workers.

    def as_metrics(self) -> dict[str, float]:
        """Flat numbers for telemetry."""
        return {
            "data/images": float(self.images),
            "data/bad_images": float(sum(self.bad.values())),
            **{f"data/bad/{reason}": float(count) for reason, count in sorted(self.bad.items())},
            "data/pages": float(self.pages),
            "data/bytes": float(self.bytes),
            "time/data_wait": self.wait_seconds,
        }


class RowSource(Protocol):
    """What a backend gives: rows in the order of its items, until it is closed."""

    def __next__(self) -> Rows: ...

    def close(self) -> None: ...


class BatchStream:
    """Iterator of one rank's batches. Close it, or use it in a `with`, to stop reading early."""

    def __init__(
        self,
        rows: RowSource,
        lanes: Sequence[int],
        shape: tuple[int, int, int],
        *,
        rows_per_lane: int,
        start_step: int,
        stop_step: int,
        num_rows: int | None = None,
        max_bad_fraction: float = 1.0,
    ) -> None:
        """`num_rows`: the tape ends there and batches are padded with weight 0 (evaluation); None: it is endless."""
        self._rows = rows
        self._lanes = list(lanes)
        self._rows_per_lane = rows_per_lane
        self._step, self._stop_step = start_step, stop_step
        self._shape, self._num_rows = shape, num_rows
        self._max_bad_fraction = max_bad_fraction
        self._buffers: dict[int, deque[Rows]] = {lane: deque() for lane in lanes}
        self._ready = dict.fromkeys(lanes, 0)  # Rows in each buffer.
        self._next_k = dict.fromkeys(lanes, start_step * rows_per_lane)  # Position that must come next.
        self._stats = ReaderStats()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __len__(self) -> int:
        """Batches still to come."""
        return max(0, self._stop_step - self._step)

    def __next__(self) -> Batch:
        if self._step >= self._stop_step:
            self.close()
            raise StopIteration
        started = time.perf_counter()
        wanted = self._rows_per_lane
        if self._num_rows is not None:
            wanted = max(0, min(wanted, self._num_rows - self._step * wanted))
        try:
            while any(ready < wanted for ready in self._ready.values()):
                self._take_in()
        except BaseException:
            self.close()
            raise
        self._stats.wait_seconds += time.perf_counter() - started
        batch = self._assemble(wanted)
        self._step += 1
        return batch

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; workers and memory are given back."""
        self._stop_step = min(self._stop_step, self._step)
        self._rows.close()
        for buffer in self._buffers.values():
            buffer.clear()

    def stats(self) -> ReaderStats:
        """Counters so far."""
        return self._stats

    def _take_in(self) -> None:
        """Put the next rows into their lane's buffer, if they are the very next ones."""
        rows = next(self._rows, None)
        if rows is None:
            raise OrderError(
                f"reading ended before step {self._step} of {self._stop_step} was complete; please report it"
            )
        expected = self._next_k.get(rows.lane)
        if rows.k != expected:
            raise OrderError(
                f"lane {rows.lane} gave position {rows.k} where {expected} had to come: the stream lost, repeated or "
                "reordered rows; resume from the last checkpoint, and report it"
            )
        self._next_k[rows.lane] += len(rows)
        self._ready[rows.lane] += len(rows)
        self._buffers[rows.lane].append(rows)
        self._count(rows)

    def _count(self, rows: Rows) -> None:
        stats = self._stats
        stats.images += len(rows)
        stats.pages += rows.num_pages
        stats.bytes += rows.num_bytes
        stats.read_cpu_seconds += rows.cpu_seconds
        if all(rows.weights):
            return
        for fault in filter(None, rows.faults):
            reason = fault.partition(":")[0]
            stats.bad[reason] += 1
            if stats.bad[reason] <= FAULTS_TOLD:
                log.warning("bad sample, weight 0: %s", fault)
        total = sum(stats.bad.values())
        if total > self._max_bad_fraction * max(stats.images, FEWEST_JUDGED):
            raise SampleError(
                f"{total} of {stats.images} images are bad ({dict(stats.bad)}), more than max_bad_fraction="
                f"{self._max_bad_fraction}; look at the warnings above, repair the corpus or raise the limit"
            )

    def _assemble(self, wanted: int) -> Batch:
        """One step's batch, lane by lane: the one copy between the backend's memory and the model's."""
        import torch

        size = self._rows_per_lane * len(self._lanes)
        images = np.empty((size, *self._shape), np.uint8)
        labels, ids = np.zeros(size, np.int64), np.full(size, -1, np.int64)
        weights = np.zeros(size, np.float32)
        at = 0
        for lane in self._lanes:
            end = at + wanted
            while at < end:
                rows = self._buffers[lane][0]
                count = min(len(rows), end - at)
                target = slice(at, at + count)
                images[target], labels[target] = rows.images[:count], rows.labels[:count]
                weights[target], ids[target] = rows.weights[:count], rows.sample_ids[:count]
                at += count
                self._ready[lane] -= count
                if count == len(rows):
                    self._buffers[lane].popleft()
                else:
                    self._buffers[lane][0] = _tail(rows, count)
        images[at:] = 0
        return Batch(
            torch.from_numpy(images),
            torch.from_numpy(labels),
            torch.from_numpy(weights),
            torch.from_numpy(ids),
            step=self._step if self._num_rows is None else None,
        )


def _tail(rows: Rows, count: int) -> Rows:
    """Views of the rows after the first `count`."""
    return Rows(
        rows.lane,
        rows.k + count,
        rows.images[count:],
        rows.labels[count:],
        rows.weights[count:],
        rows.sample_ids[count:],
        rows.faults[count:],
    )
