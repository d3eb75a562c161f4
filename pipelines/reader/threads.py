"""The backend without Ray: pages are fetched on threads of this process, for plain scripts, tests and small corpora."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from pipelines.reader.rows import FetchJob, Item, Rows, read_files

__all__ = ["read_in_threads"]

FETCHING = 4  # Windows on their way at once: a store answers late, not slowly.


def read_in_threads(job: FetchJob, items: Iterator[Item], fetching: int = FETCHING) -> Generator[Rows, None, None]:
    """The files of each item in the order of the items; at most `fetching` items are read ahead of the one taken."""
    pool = ThreadPoolExecutor(fetching, thread_name_prefix="fetch")
    waiting: deque[Future[Rows]] = deque()

    def submit(count: int) -> None:
        waiting.extend(pool.submit(read_files, job, item) for item in islice(items, count))

    try:
        submit(fetching)
        while waiting:
            rows = waiting.popleft().result()
            submit(1)
            yield rows
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
