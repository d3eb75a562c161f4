"""A whole rank without Ray: batches from numbers, checkpoints in a folder."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import identity, store
from pipelines.batch import Batch
from pipelines.training.config import CheckpointConfig
from pipelines.training.names import FAULT, OUTCOME, PROGRESS, SAMPLES, STOP, WEIGHTS, TrainingError
from pipelines.training.parallel import Ranks
from pipelines.training.session import Session, SessionConfig
from tests.pipelines.training.tiny import CLASSES, make_batch, make_batches, make_config, make_state, prepare

STEPS = 20


class Killed(BaseException):
    """Ends a session as SIGKILL does: nothing is written after it."""


class Place:
    """One digest in a folder; each attempt takes the lease."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder / "runs" / "pretrain" / ("d" * 64))

    def attempt(self, number: int) -> identity.Attempt:
        store.write_json(store.join(self.root, "lease.json"), {"token": f"t{number}"})
        return identity.Attempt("pretrain", "d" * 64, number, self.root, f"t{number}")

    def read(self, number: int, name: str) -> Any:
        return json.loads((Path(self.root) / "attempts" / str(number) / name).read_text())

    def weights(self, number: int) -> str:
        return hashlib.sha256((Path(self.root) / "attempts" / str(number) / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def session(
    attempt: identity.Attempt,
    points: list[tuple[str, int]] | None = None,
    *,
    until: Callable[[int], None] = lambda step: None,
    lanes: int = 4,
    first_attempt: int = 1,
    bad_samples: Callable[[], dict[str, int]] | None = None,
) -> Session:
    state = make_state()

    @contextmanager
    def training(start: int, lanes: int) -> Iterator[Iterator[Batch]]:
        def watched() -> Iterator[Batch]:
            for batch in make_batches(start):
                until(batch.step or 0)
                yield batch

        yield watched()

    @contextmanager
    def held_out() -> Iterator[Iterator[Batch]]:
        yield iter([make_batch(500), make_batch(501)])

    def log(values: dict[str, float], step: int) -> None:
        if points is not None:
            # As in MLflow's log: what an attempt before has logged is not logged again.
            points.extend((key, step) for key in values if (key, step) not in points)

    return Session(
        SessionConfig(
            attempt=attempt,
            loop=make_config(STEPS, validate_every_steps=8),
            order={"corpus": "c", "lanes": lanes},
            checkpoint=CheckpointConfig(every_seconds=1e9, every_steps=5),
            num_classes=CLASSES,
            first_attempt=first_attempt,
        ),
        state,
        Ranks(),
        prepare=prepare,
        training=training,
        validation=held_out,
        test=held_out,
        open_log=lambda: nullcontext(log),
        export=lambda path: save_file(dict(state.model.state_dict()), path),
        bad_samples=bad_samples,
    )


def kill_at(step: int) -> Callable[[int], None]:
    def check(current: int) -> None:
        if current == step:
            raise Killed

    return check


def test_it_leaves_weights_figures_and_an_outcome(place: Place) -> None:
    points: list[tuple[str, int]] = []
    session(place.attempt(1), points).run()
    outcome = place.read(1, OUTCOME)
    assert outcome["step"] == STEPS and outcome["weights"].endswith(WEIGHTS)
    assert outcome["measured_images"] == {"val": 14, "test": 14}
    assert outcome["metrics"]["val/top1"] == outcome["metrics"]["test/top1"]
    assert sum(map(sum, outcome["confusion"])) == 14
    samples = load_file(Path(place.root) / "attempts" / "1" / SAMPLES)
    assert samples["images"].dtype == torch.uint8 and len(samples["labels"]) == 14
    assert [step for key, step in points if key == "val/top1"] == [8, 16, 20]
    assert [step for key, step in points if key == "test/top1"] == [20]
    assert place.read(1, PROGRESS)["step"] == STEPS


def test_bad_samples_stand_in_the_curves_by_reason(place: Place) -> None:
    points: list[tuple[str, int]] = []
    session(place.attempt(1), points, bad_samples=lambda: {"empty": 0, "undecodable": 3}).run()
    assert ("data/bad/undecodable", 4) in points
    assert not [key for key, _ in points if key == "data/bad/empty"]
    assert place.read(1, OUTCOME)["metrics"]["data/bad/undecodable"] == 3


@pytest.mark.parametrize("killed", [3, 5, 6, 13, 19])
def test_killed_anywhere_the_next_attempt_ends_with_the_same_weights(place: Place, tmp_path: Path, killed: int) -> None:
    other = Place(tmp_path / "uninterrupted")
    session(other.attempt(1)).run()
    with pytest.raises(Killed):
        session(place.attempt(1), until=kill_at(killed)).run()
    seen: list[int] = []
    session(place.attempt(2), until=seen.append).run()
    assert place.weights(2) == other.weights(1)
    # An upload under way at the moment of death may be lost, never the one before it.
    assert min(seen) >= (killed // 5 - 1) * 5


def test_a_killed_run_leaves_no_hole_in_its_curves(place: Place) -> None:
    """Whether or not tracking had taken the points before the kill: those of the steps before the checkpoint."""
    points: list[tuple[str, int]] = []
    with pytest.raises(Killed):
        session(place.attempt(1), until=kill_at(17)).run()  # This attempt's points are lost, all of them.
    session(place.attempt(2), points).run()
    losses = [step for key, step in points if key == "train/loss"]
    assert losses == sorted(set(losses))
    assert losses[0] <= 5 and losses[-1] == STEPS


def test_lanes_come_from_the_checkpoint_whatever_the_new_start_would_choose(place: Place) -> None:
    with pytest.raises(Killed):
        session(place.attempt(1), until=kill_at(11)).run()
    again = session(place.attempt(2), lanes=8)
    again.run()
    assert again._order["lanes"] == 4


def test_again_starts_from_the_beginning(place: Place) -> None:
    session(place.attempt(1)).run()
    seen: list[int] = []
    session(place.attempt(2), until=seen.append, first_attempt=2).run()
    assert seen[0] == 0 and place.weights(1) == place.weights(2)


def test_a_finished_training_whose_result_was_lost_is_measured_again_and_not_trained_again(place: Place) -> None:
    session(place.attempt(1)).run()
    seen: list[int] = []
    session(place.attempt(2), until=seen.append).run()
    assert seen == [] and place.weights(2) == place.weights(1)
    assert place.read(2, OUTCOME)["metrics"]["test/top1"] == place.read(1, OUTCOME)["metrics"]["test/top1"]


def test_a_stop_request_ends_with_a_checkpoint_of_that_very_step(place: Place) -> None:
    attempt = place.attempt(1)
    one = session(attempt)
    assert one._reporter is not None
    one._reporter.stop()
    one.run()
    assert place.read(1, OUTCOME) | {"stopped": True, "step": 4} == place.read(1, OUTCOME)
    seen: list[int] = []
    session(place.attempt(2), until=seen.append).run()
    assert seen[0] == 4


def test_a_stop_object_of_the_driver_reaches_the_loop(place: Place) -> None:
    import time

    attempt = place.attempt(1)
    store.write_json(store.join(attempt.uri, STOP), {})
    one = session(attempt, until=lambda step: time.sleep(0.15))
    one.run()
    assert place.read(1, OUTCOME)["stopped"] and place.read(1, OUTCOME)["step"] < STEPS


def test_an_attempt_that_lost_its_lease_stops_and_commits_nothing(place: Place) -> None:
    attempt = place.attempt(1)

    def lose(step: int) -> None:
        if step == 12:
            place.attempt(2)

    one = session(attempt, until=lose)
    one.run()
    assert "another attempt took over" in place.read(1, OUTCOME)["error"]
    assert not (Path(place.root) / "attempts" / "1" / WEIGHTS).exists()
    committed = [found.step for found in one._checkpoints.found()]
    assert 5 in committed and max(committed) <= 10


def test_what_fails_again_and_again_from_the_same_step_is_given_up_with_its_reason(place: Place) -> None:
    attempt = place.attempt(1)

    def fail(step: int) -> None:
        if step == 6:
            raise RuntimeError("the disk is on fire")

    for _ in range(4):
        with pytest.raises(RuntimeError):
            session(attempt, until=fail).run()
    assert place.read(1, FAULT)["error"] == "RuntimeError: the disk is on fire"
    session(attempt, until=fail).run()
    error = place.read(1, OUTCOME)["error"]
    assert "started 4 times from step 5" in error and "the disk is on fire" in error


def test_a_loss_that_is_not_finite_is_an_outcome_and_not_a_retry(place: Place) -> None:
    one = session(place.attempt(1))
    with torch.no_grad():
        for parameter in one.state.model.parameters():
            parameter.fill_(float("inf"))
    one.run()
    assert "must be finite" in place.read(1, OUTCOME)["error"]


def test_no_point_of_the_curves_is_lost_while_tracking_cannot_be_reached(place: Place) -> None:
    tries = itertools.count()
    points: list[int] = []

    closed: list[bool] = []

    @contextmanager
    def open_log() -> Iterator[Callable[[dict[str, float], int], None]]:
        if next(tries) < 2:
            raise ConnectionError("not yet")

        def log(values: dict[str, float], step: int) -> None:
            if next(tries) == 4:
                raise ConnectionError("gone for a moment")
            points.append(step)

        yield log
        closed.append(True)

    from pipelines.training.reporter import Reporter

    reporter = Reporter(place.attempt(1).uri, open_log, every_seconds=0.05)
    for step in range(5):
        reporter.log({"train/loss": 1.0}, step)
    reporter.close()
    assert points == [0, 1, 2, 3, 4] and closed


def test_another_order_of_images_is_refused(place: Place) -> None:
    with pytest.raises(Killed):
        session(place.attempt(1), until=kill_at(11)).run()
    one = session(place.attempt(2))
    one._order["corpus"] = "other"
    with pytest.raises(TrainingError, match="another order of images"):
        one._resume()
