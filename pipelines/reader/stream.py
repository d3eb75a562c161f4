"""The batches of a rank, step after step, with what reading has cost and what was bad."""

from __future__ import annotations

import logging
import time
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import get_args

from pipelines.batch import Batch
from pipelines.reader.assemble import Assembler, RowSource, Step
from pipelines.reader.rows import Job, SampleError

__all__ = ["REASONS", "BatchStream", "ReaderStats"]

log = logging.getLogger(__name__)

# Why a sample can be bad besides its image: its members, the tar around it.
REASONS = (
    *("missing_image", "missing_label", "bad_label"),
    *("tar_checksum", "tar_duplicate", "tar_header", "tar_truncated", "tar_unsafe"),
)
FAULTS_TOLD = 3  # Log lines per reason; the rest is only counted.
FEWEST_JUDGED = 1000  # The bad fraction of fewer images than these says little.


@dataclass(slots=True)
class ReaderStats:
    """What a stream has done so far; bad samples by reason."""

    images: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    pages: int = 0
    bytes: int = 0
    wait_seconds: float = 0.0  # Time in which the consumer waited for a batch.
    read_cpu_seconds: float = 0.0  # CPU time of fetching and decoding, over all workers.

    def by_reason(self) -> dict[str, int]:
        """Bad samples of every reason there is, in a fixed order: ranks can add them up."""
        from vit_model.decode import Reason

        return {reason: self.bad[reason] for reason in (*get_args(Reason), *REASONS)}


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
        job: Job | None = None,
        num_threads: int = 1,
        ahead: int = 2,
        pinned: bool = False,
        multi_label: bool = False,
    ) -> None:
        """`num_rows`: the tape ends there and batches are padded with weight 0 (evaluation); None: it is endless.

        `job`: how to decode rows that come as files, on `num_threads` threads; `ahead`: steps that are made before they
        are asked for; `pinned`: their images lie in page-locked memory; `multi_label`: labels are (B, W).
        """
        self._step, self._stop_step = start_step, stop_step
        self._is_endless = num_rows is None
        self._max_bad_fraction = max_bad_fraction
        self._stats = ReaderStats()
        self._steps = Assembler(
            rows,
            lanes,
            shape,
            rows_per_lane=rows_per_lane,
            start=start_step,
            stop=stop_step,
            num_rows=num_rows,
            job=job,
            num_threads=num_threads,
            ahead=ahead,
            pinned=pinned,
            multi_label=multi_label,
        )
        self._stop = weakref.finalize(self, self._steps.stop)
        self._stop.atexit = False  # Daemon threads end with the process.

    def __iter__(self) -> BatchStream:
        return self

    def __len__(self) -> int:
        """Batches still to come."""
        return max(0, self._stop_step - self._step)

    def __next__(self) -> Batch:
        if self._step >= self._stop_step:
            self.close()
            raise StopIteration
        started = time.perf_counter()
        try:
            step = self._steps.next()
            self._stats.wait_seconds += time.perf_counter() - started
            self._count(step)
        except BaseException:
            self.close()
            raise
        self._step += 1
        return self._batch(step)

    def __enter__(self) -> BatchStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading; workers and memory are given back."""
        self._stop_step = min(self._stop_step, self._step)
        self._stop.detach()
        self._steps.close()

    def stats(self) -> ReaderStats:
        """Counters so far; images and bad samples of the batches that were handed out."""
        spent = self._steps.spent
        self._stats.pages, self._stats.bytes, self._stats.read_cpu_seconds = spent.pages, spent.bytes, spent.cpu_seconds
        return self._stats

    def _count(self, step: Step) -> None:
        stats = self._stats
        stats.images += step.num_rows
        if not step.faults:
            return
        for place, fault in sorted(step.faults.items()):
            step.weights[place] = 0.0
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

    def _batch(self, step: Step) -> Batch:
        import torch

        return Batch(
            torch.from_numpy(step.images),
            torch.from_numpy(step.labels),
            torch.from_numpy(step.weights),
            torch.from_numpy(step.sample_ids),
            step=step.number if self._is_endless else None,
            epochs=torch.from_numpy(step.epochs),
            lanes=torch.from_numpy(step.lanes),
        )
