"""A whole rank without Ray: batches from numbers, checkpoints in a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import identity, store
from pipelines.batch import Batch
from pipelines.training.build import build_state
from pipelines.training.config import AdamW, BestConfig, CheckpointConfig, EmaConfig
from pipelines.training.names import FAULT, OUTCOME, PROGRESS, SAMPLES, STOP, WEIGHTS, TrainingError
from pipelines.training.parallel import Ranks
from pipelines.training.reporter import Reporter
from pipelines.training.session import Session, SessionConfig
from pipelines.training.state import TrainState
from pipelines.training.watch import GroupLost, MadeWay, Watcher, ask_to_make_way, forget_round, read_outcome
from tests.pipelines.training.tiny import CLASSES, TinyModel, make_batch, make_config, prepare

STEPS = 20


class Killed(BaseException):
    """Ends a session as SIGKILL does: nothing is written after it."""


class Place:
    """One digest in a folder; each attempt takes the lease."""

    def __init__(self, folder: Path) -> None:
        self.root = str(folder / "runs" / "pretrain" / ("d" * 64))

    def attempt(self, number: int, first: int = 1) -> identity.Attempt:
        store.write_json(store.join(self.root, "lease.json"), {"token": f"t{number}"})
        return identity.Attempt("pretrain", "d" * 64, number, self.root, f"t{number}", first)

    def read(self, number: int, name: str) -> Any:
        return json.loads((Path(self.root) / "attempts" / str(number) / name).read_text())

    def weights(self, number: int) -> str:
        return hashlib.sha256((Path(self.root) / "attempts" / str(number) / WEIGHTS).read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


class Tracking:
    """As MLflow's log: what an attempt before has logged is not logged again. None: whatever it takes is lost."""

    def __init__(self, points: list[tuple[str, int]] | None) -> None:
        self.points = points

    def __call__(self, values: dict[str, float], step: int) -> None:
        if self.points is not None:
            self.points.extend((key, step) for key in values if (key, step) not in self.points)  # type: ignore[operator]

    def flush(self) -> bool:
        return self.points is not None


def session(
    attempt: identity.Attempt,
    points: list[tuple[str, int]] | None = None,
    *,
    until: Callable[[int], None] = lambda step: None,
    lanes: int = 4,
    window_pages: int = 4,
    engine: str = "wheels 1",
    train: dict[str, Any] | None = None,
    best: BestConfig | None = None,
    batch_of: Callable[[int], Batch] = make_batch,
    bad_samples: Callable[[], dict[str, int]] | None = None,
    is_noticed: Callable[[], bool] = lambda: False,
) -> Session:
    loop = make_config(STEPS, validate_every_steps=8)
    loop = dataclasses.replace(loop, train=dataclasses.replace(loop.train, **(train or {})))
    torch.manual_seed(7)
    state = build_state(TinyModel(), loop.train, AdamW(peak_lr=1e-2), Ranks())

    @contextmanager
    def training(start: int, order: Mapping[str, Any]) -> Iterator[Iterator[Batch]]:
        def watched() -> Iterator[Batch]:
            for step in itertools.count(start):
                until(step)
                yield batch_of(step)

        yield watched()

    @contextmanager
    def held_out() -> Iterator[Iterator[Batch]]:
        yield iter([make_batch(500), make_batch(501)])

    return Session(
        SessionConfig(
            attempt=attempt,
            loop=loop,
            best=best,
            order={"corpus": "c", "lanes": lanes, "window_pages": window_pages},
            engine=engine,
            checkpoint=CheckpointConfig(every_seconds=1e9, every_steps=5),
            num_classes=CLASSES,
        ),
        state,
        Ranks(),
        prepare=prepare,
        training=training,
        validation=held_out,
        test=held_out,
        open_log=lambda: nullcontext(Tracking(points)),
        export=lambda path, tensors: save_file(dict(tensors), path),
        bad_samples=bad_samples,
        is_noticed=is_noticed,
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
    again = session(place.attempt(2), lanes=8, window_pages=2)
    again.run()
    assert (again._order.fields["lanes"], again._order.fields["window_pages"]) == (4, 4)


def test_again_starts_from_the_beginning(place: Place) -> None:
    session(place.attempt(1)).run()
    seen: list[int] = []
    session(place.attempt(2, first=2), until=seen.append).run()
    assert seen[0] == 0 and place.weights(1) == place.weights(2)


def test_an_interrupted_again_goes_on_with_its_own_checkpoints(place: Place) -> None:
    session(place.attempt(1)).run()
    with pytest.raises(Killed):
        session(place.attempt(2, first=2), until=kill_at(12)).run()
    seen: list[int] = []
    session(place.attempt(3, first=2), until=seen.append).run()
    assert seen[0] in {5, 10}
    assert place.weights(3) == place.weights(1)


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
    attempt = place.attempt(1)
    store.write_json(store.join(attempt.uri, STOP), {})
    one = session(attempt, until=lambda step: time.sleep(0.15))
    one.run()
    assert place.read(1, OUTCOME)["stopped"] and place.read(1, OUTCOME)["step"] < STEPS


def test_workers_that_make_way_say_why_and_lose_no_step(place: Place) -> None:
    attempt = place.attempt(1)
    ask_to_make_way(attempt, "there is room for 3 workers instead of 2")
    session(attempt, until=lambda step: time.sleep(0.15)).run()
    stopped = place.read(1, OUTCOME)["step"]
    with pytest.raises(MadeWay, match="there is room for 3 workers instead of 2"):
        read_outcome(attempt, None)
    forget_round(attempt)
    with pytest.raises(GroupLost, match="left no result"):
        read_outcome(attempt, None)
    seen: list[int] = []
    session(attempt, until=seen.append).run()  # Of the same attempt: nobody has to ask for it again.
    assert seen[0] == stopped < STEPS
    assert read_outcome(attempt, None).step == STEPS
    assert place.read(1, PROGRESS)["notes"] == [f"resumed from the checkpoint at step {stopped} (attempt 1)"]


def test_a_notice_to_the_process_ends_in_a_checkpoint_of_that_window(place: Place) -> None:
    attempt = place.attempt(1)
    one = session(attempt, is_noticed=lambda: True)
    one.run()
    assert place.read(1, OUTCOME)["step"] == 4
    with pytest.raises(MadeWay, match="worker 0 got notice that the machine will be taken away"):
        read_outcome(attempt, None)


def test_an_attempt_that_lost_its_lease_stops_and_commits_nothing(place: Place) -> None:
    attempt = place.attempt(1)

    def lose(step: int) -> None:
        if step == 12:
            place.attempt(2)

    one = session(attempt, until=lose)
    with suppress(TrainingError):  # Raised where it is known at the last step alone.
        one.run()
    assert "another attempt took over" in place.read(1, OUTCOME)["error"]
    assert not (Path(place.root) / "attempts" / "1" / WEIGHTS).exists()
    committed = [found.step for found in one._saves._checkpoints.found()]
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
    with pytest.raises(TrainingError, match="started 4 times"):
        session(attempt, until=fail).run()
    error = place.read(1, OUTCOME)["error"]
    assert "started 4 times from step 5" in error and "the disk is on fire" in error


def test_a_loss_that_is_not_finite_is_an_outcome_and_not_a_retry(place: Place) -> None:
    one = session(place.attempt(1))
    with torch.no_grad():
        for parameter in one.state.model.parameters():
            parameter.fill_(float("inf"))
    with pytest.raises(TrainingError, match="step 0 is not finite"):
        one.run()
    assert "step 0 is not finite" in place.read(1, OUTCOME)["error"]


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

    reporter = Reporter(place.attempt(1).uri, open_log, every_seconds=0.05)
    for step in range(5):
        reporter.log({"train/loss": 1.0}, step)
    reporter.close()
    assert points == [0, 1, 2, 3, 4] and closed


def test_another_order_of_images_is_refused(place: Place) -> None:
    with pytest.raises(Killed):
        session(place.attempt(1), until=kill_at(11)).run()
    one = session(place.attempt(2))
    one._order.fields["corpus"] = "other"
    with pytest.raises(identity.CannotResume, match="another order of images"):
        one.run()
    assert place.read(2, OUTCOME)["begin_anew"]


def test_another_decode_engine_in_the_middle_of_a_run_is_refused(place: Place) -> None:
    with pytest.raises(Killed):
        session(place.attempt(1), until=kill_at(11)).run()
    with pytest.raises(
        identity.CannotResume, match=r"made with the decode engine wheels 1, here is wheels 2: .*--again"
    ):
        session(place.attempt(2), engine="wheels 2").run()
    left = place.read(2, OUTCOME)
    assert "install those versions again" in left["error"] and left["begin_anew"]
    session(place.attempt(3)).run()
    session(place.attempt(4, first=4), engine="wheels 2").run()


def test_a_checkpoint_of_before_engines_and_windows_were_kept_is_taken(place: Place) -> None:
    one = session(place.attempt(1))
    one._order.fields.pop("window_pages")
    whole = one._saves._checkpoints.save(5, one.state.tensors(), {"order": one._order.fields, "curves": []})
    seen: list[int] = []
    session(place.attempt(2), until=seen.append).run()
    assert seen[0] == whole.step == 5


def test_a_final_error_of_any_rank_is_left_for_the_driver(place: Place) -> None:
    """A rank other than 0 says it, since rank 0 hangs in a collective."""
    one = session(place.attempt(1))
    one.ranks = Ranks(1, 1)
    one._reporter = None

    def fail() -> None:
        raise TrainingError("the batches ended")

    one._resume = fail  # type: ignore[method-assign]
    with pytest.raises(TrainingError):
        one.run()
    assert place.read(1, OUTCOME)["error"] == "the batches ended"


# What a run may keep and hand on besides the last weights -------------------------------------------------------------


def tensors_of(place: Place, number: int, name: str) -> dict[str, torch.Tensor]:
    return dict(load_file(Path(place.root) / "attempts" / str(number) / name))


def test_the_average_is_measured_and_handed_on_when_it_is_asked_for(place: Place) -> None:
    points: list[tuple[str, int]] = []
    one = session(place.attempt(1), points, train={"ema": EmaConfig(decay=0.7), "export": "ema"})
    one.run()
    outcome = place.read(1, OUTCOME)
    assert [step for key, step in points if key == "ema/top1"] == [8, 16, 20]
    assert outcome["metrics"]["val/loss"] == outcome["metrics"]["test/loss"] == outcome["metrics"]["ema/loss"]
    exported, last = tensors_of(place, 1, WEIGHTS), tensors_of(place, 1, "weights-last.safetensors")
    assert one.state.ema is not None and outcome["others"]["last"].endswith("weights-last.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in one.state.ema.tensors.items())
    assert all(torch.equal(tensor, last[name]) for name, tensor in one.state.weights().items())


def test_the_best_weights_are_those_of_the_best_measurement(place: Place, tmp_path: Path) -> None:
    """What it learns by heart are other batches than those it is measured on: the loss there rises."""
    kept: dict[int, dict[str, torch.Tensor]] = {}
    options: dict[str, Any] = {"best": BestConfig(metric="val/loss"), "train": {"export": "best"}}
    other = Place(tmp_path / "uninterrupted")
    whole = session(other.attempt(1), **options)
    watched = whole._saves.after_step

    def keep(state: TrainState) -> None:
        kept[state.step] = {name: tensor.clone() for name, tensor in state.weights().items()}
        watched(state)

    whole._saves.after_step = keep  # type: ignore[method-assign]
    whole.run()
    best = other.read(1, OUTCOME)["best"]
    assert best["step"] in (8, 16)
    assert all(torch.equal(tensor, kept[best["step"]][name]) for name, tensor in tensors_of(other, 1, WEIGHTS).items())
    assert other.read(1, OUTCOME)["metrics"]["test/loss"] == pytest.approx(best["value"])
    with pytest.raises(Killed):
        session(place.attempt(1), until=kill_at(18), **options).run()
    session(place.attempt(2), **options).run()
    assert place.read(2, OUTCOME)["best"] == best and place.weights(2) == other.weights(1)


def test_training_ends_early_when_patience_is_at_its_end_also_after_a_resume(place: Place) -> None:
    options: dict[str, Any] = {"best": BestConfig(metric="val/loss", patience=1)}
    session(place.attempt(1), **options).run()
    outcome = place.read(1, OUTCOME)
    assert outcome["step"] == 16 and outcome["best"]["step"] == 8 and outcome["measured_images"]["test"] == 14
    seen: list[int] = []
    session(place.attempt(2), until=seen.append, **options).run()
    assert seen == [] and place.read(2, OUTCOME)["step"] == 16 and place.weights(2) == place.weights(1)


def test_a_stop_before_the_first_measurement_is_no_error_whatever_is_handed_on(place: Place) -> None:
    one = session(place.attempt(1), best=BestConfig(metric="val/loss"), train={"export": "best"})
    assert one._reporter is not None
    one._reporter.stop()
    one.run()
    assert place.read(1, OUTCOME)["stopped"] and place.read(1, OUTCOME)["step"] == 4


def spoiled(*steps: int) -> Callable[[int], Batch]:
    def make(step: int) -> Batch:
        batch = make_batch(step)
        return dataclasses.replace(batch, weights=batch.weights * float("nan")) if step in steps else batch

    return make


def test_a_step_that_is_not_finite_is_left_out_when_that_is_the_policy(place: Place) -> None:
    points: list[tuple[str, int]] = []
    session(place.attempt(1), points, train={"non_finite": "rollback"}, batch_of=spoiled(2, 13)).run()
    outcome = place.read(1, OUTCOME)
    assert outcome["left_out"] == [2, 13] and outcome["step"] == STEPS
    assert all(tensor.isfinite().all() for tensor in tensors_of(place, 1, WEIGHTS).values())
    assert "step 13 was not finite: back to step 10, and it is left out" in place.read(1, PROGRESS)["notes"]
    assert [step for key, step in points if key == "train/loss"] == [4, 8, 12, 16, 20]


def test_spoiled_weights_are_never_stored(place: Place) -> None:
    one = session(place.attempt(1), batch_of=spoiled(13))
    with pytest.raises(TrainingError, match="step 13 is not finite"):
        one.run()
    assert max(found.step for found in one._saves._checkpoints.found()) == 10


def test_too_many_bad_steps_are_no_accident(place: Place) -> None:
    one = session(place.attempt(1), train={"non_finite": "rollback"}, batch_of=spoiled(*range(9, 20)))
    with pytest.raises(TrainingError, match="5 steps were left out before it"):
        one.run()
    assert "is not finite" in place.read(1, OUTCOME)["error"]


def test_every_note_is_said_once_however_many_there_are(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    attempt = place.attempt(1)
    watcher = Watcher(attempt, lambda *_, **__: None)
    for start in range(2):
        reporter = Reporter(attempt.uri, lambda: nullcontext(Tracking([])), every_seconds=3600)
        for number in range(130):
            reporter.note(f"start {start}, note {number}")
            if number % 40 == 39 or number == 129:
                store.write_json(store.join(attempt.uri, PROGRESS), reporter._progress)
                watcher(now=True)
        reporter.close()
    told = capsys.readouterr()
    assert (told.out + told.err).count("start 0, note ") == (told.out + told.err).count("start 1, note ") == 130
