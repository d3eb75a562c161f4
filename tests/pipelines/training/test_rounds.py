"""Round after round of workers, without Ray: what ends a run and what starts the next group, and how large it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import store
from pipelines.identity import CannotResume
from pipelines.training import worker
from pipelines.training.config import WorkerConfig
from pipelines.training.names import OUTCOME, STOP, TrainingError
from pipelines.training.placement import Placement
from pipelines.training.watch import GroupLost, ask_to_make_way
from tests.pipelines.tracking.toys import attempt
from tests.pipelines.training.test_worker import Job

DONE = {"weights": "w", "step": 10, "metrics": {}, "train_seconds": 1.0}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Runs a job whose groups leave these outcomes (None: none) while there is this room; the size of each group."""
    monkeypatch.setenv("VIT_ROOT", str(tmp_path))
    monkeypatch.setattr(worker, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(worker, "FREED_SECONDS", 0.0)

    def start(outcomes: list[Any], rooms: list[int], limits: tuple[int, int] | None, **workers: Any) -> list[int]:
        job = Job(attempt("e" * 64), workers=WorkerConfig(**workers))
        sizes: list[int] = []
        left, free = iter(outcomes), iter(rooms)

        class Group:
            room = 0

            def __init__(self, job: Any, placement: Placement, number: int, watcher: Any, taken: int) -> None:
                assert number == len(sizes) + 1
                sizes.append(placement.count)

            def run(self) -> BaseException | None:
                assert not store.exists(store.join(job.attempt.uri, OUTCOME)), "the word of the group before"
                assert not store.exists(store.join(job.attempt.uri, STOP)), "a wish that was fulfilled"
                outcome = next(left)
                if outcome is None or isinstance(outcome, BaseException):
                    return outcome or RuntimeError("lost")
                ask_to_make_way(job.attempt, "asked")
                store.write_json(store.join(job.attempt.uri, OUTCOME), outcome)
                return None

        monkeypatch.setattr(worker, "_Round", Group)
        monkeypatch.setattr(worker, "room_for", lambda need: next(free))
        worker.launch(job, Placement(2, False, "a test", limits=limits))  # type: ignore[arg-type]
        return sizes

    return start


def test_workers_that_made_way_start_again_with_as_many_as_fit(run: Callable[..., list[int]]) -> None:
    again = {"stopped": True, "again": "there is room for 3 workers"}
    assert run([again, again, DONE], [3, 9], (1, 4)) == [2, 3, 4]


def test_a_fixed_number_stays_and_waits_for_nothing(run: Callable[..., list[int]]) -> None:
    assert run([{"stopped": True, "again": "worker 1 got notice"}, DONE], [], None) == [2, 2]


def test_lost_workers_are_replaced_by_as_many_as_fit_once_the_fewest_do(run: Callable[..., list[int]]) -> None:
    assert run([None, DONE], [0, 0, 1], (1, 4)) == [2, 1]


def test_a_range_is_given_up_after_max_failures_and_a_fixed_number_by_ray_itself(run: Callable[..., list[int]]) -> None:
    with pytest.raises(GroupLost, match="RuntimeError: lost"):
        run([None, None, None], [2, 2], (1, 4), max_failures=2)
    with pytest.raises(GroupLost):
        run([None], [], None)


def test_what_no_rank_can_build_is_not_tried_again(run: Callable[..., list[int]]) -> None:
    """With a range of workers too, where a group that is lost without an outcome is started anew."""
    for final in (TrainingError("parallel.kind=fsdp cuts"), CannotResume("another engine")):
        with pytest.raises(type(final), match=str(final)) as caught:
            run([final], [4] * 9, (1, 4), max_failures=8)
        assert not isinstance(caught.value, GroupLost)


def test_a_stop_that_nobody_wants_resumed_is_an_interrupt(run: Callable[..., list[int]]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run([{"stopped": True}], [], (1, 4))
