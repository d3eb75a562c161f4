"""The backend without Ray: reading work on threads of this process, for plain scripts, tests and small corpora."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice

from pipelines.reader.rows import Item, Job, Rows, read_item

__all__ = ["read_in_threads"]

WAITING = 2  # Finished items that may wait for the consumer, so that no thread idles while it computes.


def read_in_threads(job: Job, items: Iterator[Item], num_threads: int) -> Generator[Rows, None, None]:
    """Rows of each item in the order of the items; a bounded number of items is in work or waits to be taken."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")
    waiting: deque[Future[list[Rows]]] = deque()

    def submit(count: int) -> None:
        waiting.extend(pool.submit(_read_whole, job, item) for item in islice(items, count))

    try:
        submit(num_threads + WAITING)
        while waiting:
            pieces = waiting.popleft().result()
            submit(1)
            yield from pieces
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _read_whole(job: Job, item: Item) -> list[Rows]:
    return list(read_item(job, item))
