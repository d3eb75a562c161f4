"""The same work on many small items: in this process, or as Ray Data tasks on any CPU of the cluster."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pipelines import store
from pipelines.corpus.errors import CorpusError

__all__ = ["map_items"]

CPUS = 0.5  # Of a task: while one waits for the store, another that shares its CPU works.
MAX_TASKS = 2048  # Tasks of one execution; with more items than that a task takes several.
Work = Callable[..., Mapping[str, Any]]


def map_items(
    work: Work, items: Sequence[Mapping[str, Any]], *arguments: Any, num_workers: int | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number of an item and `work(item, *arguments)` for it, as they are done.

    Items and results are JSON objects; `work` can be pickled. `num_workers`: items at a time, None: two a CPU of the
    cluster, 0: in this process, in order, without Ray. Raises the first CorpusError, StoreError or OSError of the work.
    """
    if num_workers == 0:
        for number, item in enumerate(items):
            yield number, work(item, *arguments)
        return
    if not items:
        return
    import pyarrow as pa
    import ray

    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="WARNING")
    # Our own bar says more, and Ray Data logs the trace of an error that we report ourselves.
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    table = pa.table({"number": list(range(len(items))), "item": [json.dumps(item) for item in items]})
    tasks = min(len(items), MAX_TASKS)
    cuts = [len(items) * i // tasks for i in range(tasks + 1)]
    blocks = [table.slice(low, high - low) for low, high in pairwise(cuts)]
    done = ray.data.from_arrow(blocks).map_batches(
        _run_batch, fn_args=(work, arguments), batch_size=None, num_cpus=CPUS, concurrency=num_workers
    )
    for row in done.iter_rows():
        if row["error"]:
            raise CorpusError(row["error"])
        yield row["number"], json.loads(row["result"])


def _run_batch(batch: Mapping[str, Any], work: Work, arguments: tuple[Any, ...]) -> dict[str, list[Any]]:
    """Expected errors travel as text: Ray would wrap them in its own trace."""
    out: dict[str, list[Any]] = {"number": [], "result": [], "error": []}
    for number, item in zip(batch["number"].tolist(), batch["item"].tolist(), strict=True):
        result, error = "", ""
        try:
            result = json.dumps(work(json.loads(item), *arguments))
        except (CorpusError, store.StoreError, OSError) as problem:
            error = str(problem) or type(problem).__name__
        out["number"].append(number)
        out["result"].append(result)
        out["error"].append(error)
        if error:
            break
    return out
