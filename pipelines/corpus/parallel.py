"""The same work on many small items: in this process, or as Ray Data tasks on any CPU of the cluster."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any

from pipelines import store
from pipelines.corpus.errors import CorpusError

__all__ = ["map_items"]

MAX_TASKS = 2048  # Tasks of one execution; with more items than that a task takes several.
ITEMS = 8  # Most of a task: from the second on, finishing one goes on beside the work on the next.
Work = Callable[..., Mapping[str, Any] | Callable[[], Mapping[str, Any]]]


def map_items(
    work: Work, items: Sequence[Mapping[str, Any]], *arguments: Any, num_workers: int | None
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number of an item and `work(item, *arguments)` for it, as they are done.

    Items and results are JSON objects; `work` can be pickled. It may give a call in place of a result: what is left to
    do without the CPU, such as an upload. `num_workers`: items at a time, None: one a CPU of the cluster, 0: in this
    process, in order, without Ray. Raises the first CorpusError, StoreError or OSError of the work.
    """
    if num_workers == 0:
        for number, item in enumerate(items):
            done = work(item, *arguments)
            yield number, done() if callable(done) else done
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
    from pipelines.corpus.prompt import Prompt

    table = pa.table({"number": list(range(len(items))), "item": [json.dumps(item) for item in items]})
    cuts = _cuts(len(items), int(ray.cluster_resources().get("CPU", 1)), num_workers)
    blocks = [table.slice(low, high - low) for low, high in pairwise(cuts)]
    done = ray.data.from_arrow(blocks).map_batches(
        _run_batch, fn_args=(work, arguments), batch_size=None, concurrency=num_workers
    )
    context = done.context  # The dataset's own copy: nothing changes for other users of this process.
    context.custom_execution_callback_classes = [*context.custom_execution_callback_classes, Prompt]
    for row in done.iter_rows():
        if row["error"]:
            raise CorpusError(row["error"])
        yield row["number"], json.loads(row["result"])


def _cuts(items: int, cpus: int, num_workers: int | None) -> list[int]:
    """Where the items are cut into tasks: long ones first, short ones last, so that all CPUs end together.

    Guided self-scheduling (Polychronopoulos, Kuck 1987): a task takes two thirds of its CPU's share of what is left.
    """
    slots = max(1, min(cpus, num_workers or cpus))
    most = max(ITEMS, -(-items // MAX_TASKS))
    cuts = [0]
    while (left := items - cuts[-1]) > 0:
        cuts.append(cuts[-1] + min(most, -(-2 * left // (3 * slots))))
    return cuts


def _run_batch(batch: Mapping[str, Any], work: Work, arguments: tuple[Any, ...]) -> dict[str, list[Any]]:
    """Expected errors travel as text: Ray would wrap them in its own trace."""
    out: dict[str, list[Any]] = {"number": [], "result": [], "error": []}

    def add(number: int, result: Mapping[str, Any], error: str) -> None:
        out["number"].append(number)
        out["result"].append(json.dumps(result))
        out["error"].append(error)

    with ThreadPoolExecutor(1) as pool:
        last: tuple[int, Future[Any]] | None = None  # Is being finished; never more than one.
        for number, item in zip(batch["number"].tolist(), batch["item"].tolist(), strict=True):
            done, error = _attempt(partial(work, json.loads(item), *arguments))
            if last is not None:
                add(last[0], *last[1].result())
                last = None
            if any(out["error"]):
                break
            if callable(done):
                last = number, pool.submit(_attempt, done)
            else:
                add(number, done, error)
                if error:
                    break
        if last is not None:
            add(last[0], *last[1].result())
    return out


def _attempt(call: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return call(), ""
    except (CorpusError, store.StoreError, OSError) as problem:
        return {}, str(problem) or type(problem).__name__
