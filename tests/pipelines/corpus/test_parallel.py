from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.corpus.errors import CorpusError
from pipelines.corpus.parallel import ITEMS, MAX_TASKS, _cuts, _run_batch, map_items

WAIT = 30.0  # Seconds after which something that should have happened did not.


def batch(count: int) -> dict[str, Any]:
    items = np.array([json.dumps({"i": i}) for i in range(count)], object)
    return {"number": np.arange(count), "item": items}


def test_one_item_is_finished_while_the_next_is_worked_on_and_results_stay_in_order() -> None:
    begun = [threading.Event() for _ in range(4)]

    def work(item: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]]:
        number = item["i"]
        begun[number].set()

        def finish() -> Mapping[str, Any]:
            assert number == 3 or begun[number + 1].wait(WAIT)  # Would wait in vain if nothing went on beside it.
            return {"done": number}

        return finish

    out = _run_batch(batch(4), work, ())
    assert [json.loads(result) for result in out["result"]] == [{"done": i} for i in range(4)]
    assert out["number"] == [0, 1, 2, 3] and out["error"] == [""] * 4


@pytest.mark.parametrize("where", ["work", "finish"])
def test_an_error_is_told_in_words_and_ends_the_task(where: str) -> None:
    finished: list[int] = []

    def work(item: Mapping[str, Any]) -> Callable[[], Mapping[str, Any]] | Mapping[str, Any]:
        number = item["i"]
        if number == 2 and where == "work":
            raise CorpusError("broken")
        if number == 0:
            return {"done": 0}

        def finish() -> Mapping[str, Any]:
            if number == 2:
                raise CorpusError("broken")
            finished.append(number)
            return {"done": number}

        return finish

    out = _run_batch(batch(9), work, ())
    assert [error for error in out["error"] if error] == ["broken"]
    assert finished[0] == 1 and len(finished) <= 2  # What was begun beside the bad one is finished, no more.
    with pytest.raises(CorpusError, match="broken"):
        list(map_items(work, [{"i": i} for i in range(9)], num_workers=0))


@given(st.integers(1, 10_000), st.integers(1, 500), st.none() | st.integers(1, 600))
def test_tasks_take_every_item_once_and_become_shorter(items: int, cpus: int, num_workers: int | None) -> None:
    cuts, slots = _cuts(items, cpus, num_workers), min(cpus, num_workers or cpus)
    sizes = np.diff(cuts)
    assert cuts[0] == 0 and cuts[-1] == items and (sizes > 0).all()
    assert (np.diff(sizes) <= 0).all() and sizes[-1] <= 2
    assert len(sizes) >= min(items, slots)  # No CPU is left idle.
    assert len(sizes) <= MAX_TASKS + 5 * slots and sizes[0] <= max(ITEMS, -(-items // MAX_TASKS))
