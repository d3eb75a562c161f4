"""Why a group of workers started again, and how often it did from the same step."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from pipelines import store
from pipelines.training.names import FAULT, STARTS
from pipelines.training.pieces import OutOfMemory

__all__ = ["MOST_STARTS", "Faults", "say_noticed"]

MOST_STARTS = 4  # In a row from the same step: what failed three times there fails again.
OTHER_SIZE = -1  # In the list of starts: from here on with smaller pieces, so what failed before need not fail again.


def say_noticed(ranks: Sequence[int]) -> str | None:
    """For the user; None if no worker was told that it will be ended."""
    if not ranks:
        return None
    which = f"worker {ranks[0]}" if len(ranks) == 1 else f"workers {', '.join(map(str, ranks))}"
    return f"{which} got notice that the machine will be taken away"


class Faults:
    """What the workers of one attempt died of, in its place in the store."""

    def __init__(self, attempt_uri: str, rank: int) -> None:
        self._uri, self._rank = attempt_uri, rank

    def record_start(self, step: int, smaller: bool = False) -> int:
        """How often in a row this attempt has started from this step; `smaller`: in a way that was not tried yet."""
        uri = store.join(self._uri, STARTS)
        try:
            starts = list(store.read_json(uri))
        except store.NotFound:
            starts = []
        starts += [OTHER_SIZE, step] if smaller else [step]
        store.write_json(uri, starts[-100:])
        same = 0
        for earlier in reversed(starts):
            if earlier != step:
                break
            same += 1
        return same

    def write(self, step: int, error: BaseException, **details: Any) -> None:
        """For the next start and for the user."""
        fault = {"rank": self._rank, "step": step, "error": f"{type(error).__name__}: {error}"[:2000], **details}
        with contextlib.suppress(store.StoreError):  # The fault itself is raised, here or not.
            store.write_json(store.join(self._uri, FAULT), fault)

    def write_stacks(self, step: int, seconds: float, text: str) -> None:
        """Of a worker that hangs."""
        uri = store.join(self._uri, f"stacks-{self._rank}.txt")
        self.write(step, TimeoutError(f"no progress for {seconds:.0f} s; where its threads stood is in {uri}"))
        store.write(uri, text.encode())

    def last(self) -> dict[str, Any] | None:
        try:
            return dict(store.read_json(store.join(self._uri, FAULT)))
        except store.NotFound:
            return None

    def say_last(self) -> str:
        fault = self.last()
        if fault is None:
            return "a worker was lost without a word (killed, or out of memory)"
        return f"worker {fault['rank']} failed at step {fault['step']:,}: {fault['error']}"

    def images_that_did_not_fit(self) -> int | None:
        """Of the last fault, if it was a full device."""
        fault = self.last()
        return int(fault["images"]) if fault and fault.get("kind") == OutOfMemory.__name__ else None
