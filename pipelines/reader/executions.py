"""The backend on Ray Data: reading work as read tasks on any CPU of the cluster, in order.

A chain of bounded executions, the next one opened ahead in a thread: Ray Data pays about 1 ms per read task before the
first block, so one execution for a whole run would wait minutes. Nothing depends on how Ray cuts blocks: every row
bears its lane and position, and the stream checks them.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
import ray
import ray.data
import ray.util
from ray.data import ExecutionResources
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from pipelines.reader.blocks import rows_of_table, table_of_pixels, tables_of_files
from pipelines.reader.engines import EngineError
from pipelines.reader.fetch import FetchError
from pipelines.reader.order import OrderError
from pipelines.reader.rows import PIECE_BYTES, FetchJob, Item, Job, Rows, SampleError, read_decoded
from pipelines.reader.threads import read_in_threads
from pipelines.store import is_s3

__all__ = ["RayRows", "StarvedError", "check_cpus"]

TASKS_PER_EXECUTION = 250
TASKS_AT_FIRST = 16  # Ray Data takes about 1 ms for each before the first block comes.
FEWEST_ROWS = 256  # Of one read task: shorter ones cost more to schedule than to run.
FEWEST_FILES = 1024  # The same where the task hands on files, which is a tenth of the work.
CPUS_PER_READER = 8  # That decode what one reading process fetches: it needs about a tenth of what decoding does.
OPEN_AHEAD = 0.8  # The next execution is opened when this part of the rows has come.
PREFETCHED_BLOCKS = 2
WAITING_BYTES = 32 << 20  # Of files in Ray's object store, about: what was once used there stays taken.
SCHEDULING_PAUSE_SECONDS = 0.01
LARGE_IMAGE_BYTES = 1 << 16


class StarvedError(RuntimeError):
    """Ray has no CPU left for reading; Ray Data itself would wait forever with one warning."""


class RayRows:
    """Rows of each item in the order of the items. Reading begins at once, before the first row is asked for."""

    def __init__(
        self, job: Job, items: Iterator[Item], num_cpus: float, world_size: int = 1, *, decode: bool = True
    ) -> None:
        """`decode`: the read tasks decode; otherwise they hand on files."""
        check_cpus(num_cpus, world_size)
        reading = Reading.decoded(num_cpus) if decode else Reading.files(num_cpus, world_size)
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # Two lines per execution otherwise.
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="reader-open")
        self._work = job, _grouped(items, reading.fewest_rows), reading
        self._upcoming: Future[_Opened] | None = self._open(TASKS_AT_FIRST)
        self._current: _Opened | None = None
        self._rows = self._chain()

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        return next(self._rows)

    def _open(self, tasks: int) -> Future[_Opened]:
        return self._opener.submit(_open, *self._work, min(tasks, TASKS_PER_EXECUTION))

    def _chain(self) -> Iterator[Rows]:
        while True:
            if self._upcoming is None:
                raise OrderError("Ray Data ended before all rows had come; resume from the last checkpoint")
            self._current, self._upcoming = self._upcoming.result(), None
            if not self._current.num_rows:
                return
            seen = 0
            for rows in self._current.rows():
                seen += len(rows)
                if self._upcoming is None and seen >= OPEN_AHEAD * self._current.num_rows:
                    self._upcoming = self._open(TASKS_PER_EXECUTION)
                yield rows

    def close(self) -> None:
        """Stop reading and give the CPUs back."""
        self._opener.shutdown(wait=True)
        if self._upcoming is not None and self._upcoming.exception() is None:
            self._upcoming.result().close()
        if self._current is not None:
            self._current.close()
        self._upcoming = self._current = None
        self._rows = iter(())


class _Opened:
    """A running execution; its first block is already on the way."""

    def __init__(self, job: Job, groups: list[list[Item]], reading: Reading) -> None:
        self.num_rows = sum(item.count for group in groups for item in group)
        self._shape = job.shape
        self._blocks: Any = iter(())
        self._first: pa.Table | None = None
        if groups:
            self._blocks = iter(
                _dataset(job, groups, reading).iter_batches(
                    batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCHED_BLOCKS
                )
            )
            self._first = self._next()

    def rows(self) -> Iterator[Rows]:
        table, self._first = self._first, None
        while table is not None:
            yield from rows_of_table(table, self._shape)
            table = self._next()

    def _next(self) -> pa.Table | None:
        try:
            return next(self._blocks, None)
        except Exception as error:
            raise _own_error(error) from None

    def close(self) -> None:
        """Stops the execution; Ray's generator shuts its executor down when closed."""
        self._first = None
        if hasattr(self._blocks, "close"):
            self._blocks.close()


def _open(job: Job, groups: Iterator[list[Item]], reading: Reading, tasks: int) -> _Opened:
    return _Opened(job, list(islice(groups, tasks)), reading)


def _grouped(items: Iterator[Item], fewest_rows: int) -> Iterator[list[Item]]:
    """Items as the work of one task each: neighbours together, until they have so many rows."""
    group: list[Item] = []
    size = 0
    for item in items:
        group.append(item)
        size += item.count
        if size >= fewest_rows:
            yield group
            group, size = [], 0
    if group:
        yield group


@dataclass(frozen=True, slots=True)
class Reading:
    """How read tasks run."""

    decode: bool
    num_cpus: float
    fewest_rows: int
    at_a_time: int | None = None  # Tasks of this rank; None: as many as there are CPUs for.
    windows_at_once: int = 1  # That one task fetches.

    @classmethod
    def decoded(cls, num_cpus: float) -> Reading:
        return cls(True, num_cpus, FEWEST_ROWS)

    @classmethod
    def files(cls, num_cpus: float, world_size: int) -> Reading:
        """One reading process for every few CPUs, with two requests on their way for each CPU that decodes."""
        cpus = float(ray.cluster_resources().get("CPU", 0.0)) / world_size
        readers = max(1, round(cpus / CPUS_PER_READER))
        return cls(False, num_cpus, FEWEST_FILES, readers, max(2, min(16, round(2 * cpus / readers))))


def _dataset(job: Job, groups: list[list[Item]], reading: Reading) -> Any:
    source = _Items(job, groups, reading)
    dataset = ray.data.read_datasource(
        source, override_num_blocks=len(groups), num_cpus=reading.num_cpus, concurrency=reading.at_a_time
    )
    context = dataset.context  # The dataset's own copy: nothing changes for other users of this process.
    context.execution_options.preserve_order = True
    context.target_max_block_size = PIECE_BYTES
    if not reading.decode:
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=WAITING_BYTES)
    context.enable_progress_bars = context.print_on_execution_start = False
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Paced]
    return dataset.iterator()


class Paced(ExecutionCallback):  # type: ignore[misc,unused-ignore]
    """A pause in each turn of Ray Data's scheduling loop, which runs as a thread of the train worker.

    While blocks wait for the consumer the loop turns without waiting for anything: it took 40 % of a core and the GIL,
    and training ran at half its rate.
    """

    def on_execution_step(self, executor: object) -> None:
        time.sleep(SCHEDULING_PAUSE_SECONDS)


class _Items(Datasource):  # type: ignore[misc,unused-ignore]
    """Items as read tasks."""

    def __init__(self, job: Job, groups: list[list[Item]], reading: Reading) -> None:
        super().__init__()
        windows = reading.windows_at_once
        read = partial(_read_decoded, job) if reading.decode else partial(_read_files, job.fetch, windows)
        self.tasks = [ReadTask(partial(read, group), _metadata(job, group, reading.decode)) for group in groups]

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        return self.tasks


def _metadata(job: Job, items: list[Item], decode: bool) -> BlockMetadata:
    rows = sum(item.count for item in items)
    size = rows * job.image_bytes if decode else sum(span.length for item in items for span in item.pages)
    return BlockMetadata(num_rows=rows, size_bytes=size, input_files=None, exec_stats=None)


def _read_decoded(job: Job, items: list[Item]) -> Iterator[pa.Table]:
    """Runs in a Ray worker."""
    for item in items:
        yield from map(table_of_pixels, read_decoded(job, item))


def _read_files(job: FetchJob, windows: int, items: list[Item]) -> Iterator[pa.Table]:
    """Runs in a Ray worker, which needs no torch for it. While one window is handed on the next ones are fetched."""
    if not is_s3(items[0].pages[0].uri):
        windows = 1  # A disk answers at once.
    with closing(read_in_threads(job, iter(items), windows)) as found:
        for rows in found:
            yield from tables_of_files(rows)


# Faults of the cluster ----------------------------------------------------------------------------------------------


def check_cpus(num_cpus: float, world_size: int) -> None:
    """Refuse to start where the training workers hold every CPU, or leave them in pieces too small for a read task."""
    total = {node["NodeID"]: float(node["Resources"].get("CPU", 0.0)) for node in ray.nodes() if node["Alive"]}
    held: defaultdict[str, float] = defaultdict(float)
    for group in ray.util.placement_group_table().values():  # Ray Train's workers stand in one.
        for number, bundle in group["bundles"].items() if group["state"] == "CREATED" else ():
            held[group["bundles_to_node_id"][number]] += bundle.get("CPU", 0.0)
    here, elsewhere = ray.get_runtime_context(), 0.0
    in_worker = here.worker.mode == ray.WORKER_MODE  # A driver holds no CPU, and must not be asked.
    if in_worker and here.get_placement_group_id() is None:
        own = float(here.get_assigned_resources().get("CPU", 0.0))
        held[here.get_node_id()] += own
        elsewhere = (world_size - 1) * own
    check_left(num_cpus, total, held, elsewhere)


def check_left(num_cpus: float, total: Mapping[str, float], held: Mapping[str, float], elsewhere: float = 0.0) -> None:
    """`total`, `held`: CPUs by node; `elsewhere`: those held on nodes that are not known."""
    left = [round(cpus - held.get(node, 0.0), 4) for node, cpus in total.items()]  # Ray counts in 1/10,000.
    largest, most = max(left, default=0.0), sum(total.values())
    if largest < num_cpus or sum(left) - elsewhere < num_cpus:
        raise StarvedError(
            f"the cluster has {most:g} CPUs, training workers and other jobs hold {most - sum(left) + elsewhere:g}, at "
            f"most {largest:g} are left on one node: none is left for a read task of {num_cpus:g}; give workers a "
            "smaller CPU share, lower the reader's num_cpus, or add nodes"
        )


def decodes_here(job: Job) -> bool:
    """Whether the process that trains should decode: all CPUs are beside it, and images are large.

    Pixels are larger than files, and moving them costs more than it gains if no other machine decodes. Small images
    cost more Python than decoding, which would stand in the way of the training thread.
    """
    alone = sum(node["Alive"] for node in ray.nodes()) == 1
    return alone and job.image_bytes >= LARGE_IMAGE_BYTES


def _own_error(error: BaseException) -> BaseException:
    """Our own error out of Ray's wrappers, so that its message is the first thing to be read."""
    seen: BaseException | None = error
    while seen is not None:
        for candidate in (getattr(seen, "cause", None), seen):  # RayTaskError keeps the worker's error as its cause.
            for kind in (FetchError, SampleError, EngineError):
                if isinstance(candidate, kind):
                    return kind(str(candidate).partition("\n")[0])  # Ray adds advice about retries in more lines.
        seen = seen.__cause__
    return error
