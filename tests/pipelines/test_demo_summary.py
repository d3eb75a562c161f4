"""How the demo ends: its own table, intervals, floors and exit code, from outcomes as the stages return them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.demo_summary import FLOORS, Measured, Summary, difference, ending, figures
from pipelines.evaluation.accuracy import wilson
from pipelines.identity import StageResult
from pipelines.workflow.runner import Outcome

COUNTS = st.tuples(st.integers(0, 400), st.integers(1, 400)).map(lambda pair: (min(pair), max(pair)))
URIS = {"finetune": "models:/digits/2", "scratch": "models:/digits-scratch/2", "promote": "models:/digits/2"}
FIRST = {"passed": True, "reason": "models:/digits/2 reaches the minimum", "champion": "models:/digits/2"}
REFUSED = {"passed": False, "reason": "models:/digits/2 has top1 0.9750, below the minimum 0.999", "champion": None}


def measured(right: int, n: int) -> Measured:
    return Measured(right / n, *wilson(right, n))


def outcome(step: str, *, reused: bool = False, details: dict[str, Any] | None = None, **metrics: float) -> Outcome:
    stage = {"scratch": "finetune", "evaluate_scratch": "evaluate"}.get(step, step)
    uri = URIS.get(step, f"s3://vit/runs/{stage}/{'a' * 64}/attempts/1/out")
    return Outcome(step, stage, StageResult(stage, uri, "a" * 64, None, metrics, details or {}, reused), 2.0)


def held_out(right: int, n: int, **more: float) -> dict[str, float]:
    low, high = wilson(right, n)
    return {"test/top1": right / n, "test/top1_low": low, "test/top1_high": high, **more}


def outcomes(pretrain: int = 8810, tuned: int = 389, twin: int = 286, promote: dict[str, Any] = FIRST) -> Any:
    done = [
        outcome("pretrain", **{**held_out(pretrain, 10_000), "images_per_second": 1103.4}),
        outcome("finetune", images_per_second=314.0),
        outcome("scratch", images_per_second=365.0),
        outcome("evaluate", **held_out(tuned, 399, **{"test/num_images": 399.0})),
        outcome("evaluate_scratch", reused=True, **held_out(twin, 399, **{"test/num_images": 399.0})),
        outcome("promote", details=promote),
        outcome("predict", details={"num_images": 1797}),
    ]
    return {one.step: one for one in done}


@given(COUNTS, COUNTS)
def test_the_interval_of_a_difference_holds_it_and_stays_within_plus_minus_one(
    one: tuple[int, int], other: tuple[int, int]
) -> None:
    gain, low, high = difference(measured(*one), measured(*other))
    assert -1 - 1e-9 <= low <= gain <= high <= 1 + 1e-9
    assert difference(measured(*other), measured(*one))[0] == pytest.approx(-gain)


def test_the_interval_of_a_difference_is_newcombes() -> None:
    # Newcombe 1998, Statistics in Medicine 17:873, table II, example (a): 56/70 - 48/80, method 10.
    gain, low, high = difference(measured(56, 70), measured(48, 80))
    assert (gain, low, high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def test_the_table_says_of_each_step_how_it_came_how_fast_and_what_it_made() -> None:
    rows = {row[0]: row[1:] for row in Summary(outcomes=outcomes()).rows()}
    assert rows["pretrain"] == ("ran", "1,103", "2.0", f"s3://vit/runs/pretrain/{'a' * 12}/attempts/1/out")
    assert rows["finetune"] == ("ran", "314", "2.0", "models:/digits/2")
    assert rows["evaluate"][:2] == ("ran", "200")  # 399 images in the two seconds of the step.
    assert rows["evaluate_scratch"][:2] == ("reused", "")  # The seconds of a reused step say nothing of a rate.
    assert rows["predict"][:2] == ("ran", "898")


def test_every_accuracy_has_its_interval_and_pretraining_its_gain() -> None:
    assert Summary(outcomes=outcomes()).accuracies() == [
        "  Fashion-MNIST, pretrained         0.881  [0.875, 0.887]",
        "  digits, fine-tuned from it        0.975  [0.954, 0.986]",
        "  digits, the same from scratch     0.717  [0.671, 0.759]",
        "  what pretraining gave             +0.258  [+0.211, +0.306]",
    ]


@pytest.mark.parametrize(
    ("pretrain", "tuned", "images", "failed"),
    [
        (8000, 360, {}, []),
        (7999, 360, {}, ["pretrain: held-out top-1 0.7999 is below 0.80"]),
        (8000, 359, {}, ["evaluate: held-out top-1 0.8975 is below 0.90"]),
        (
            1000,
            40,
            {},
            ["pretrain: held-out top-1 0.1000 is below 0.80", "evaluate: held-out top-1 0.1000 is below 0.90"],
        ),
        (7999, 40, {"own_images": True}, ["pretrain: held-out top-1 0.7999 is below 0.80"]),
        (1000, 359, {"stand_in": True}, ["evaluate: held-out top-1 0.8975 is below 0.90"]),
        (1000, 40, {"own_images": True, "stand_in": True}, []),
    ],
)
def test_below_a_floor_the_demo_fails_and_says_which(
    pretrain: int, tuned: int, images: dict[str, bool], failed: list[str]
) -> None:
    assert FLOORS == {"pretrain": 0.80, "evaluate": 0.90}
    given = outcomes(pretrain, tuned)
    given["evaluate"].result.metrics.update(held_out(tuned, 400))
    summary = Summary(outcomes=given, **images)
    assert [line.removeprefix("FAILED  ") for line in ending(summary) if line.startswith("FAILED")] == failed
    assert summary.below_floor() == failed
    assert summary.exit_code == (1 if failed else 0)


def test_a_refused_promotion_ends_with_its_reason_and_the_step_that_was_not_run() -> None:
    done = outcomes(promote=REFUSED)
    del done["predict"]
    summary = Summary(outcomes=done, not_run={"predict": "nothing was promoted"})
    told = "\n".join(ending(summary))
    assert summary.rows()[-1] == ("predict", "not run", "", "", "nothing was promoted")
    assert "REFUSED   models:/digits/2 has top1 0.9750, below the minimum 0.999\n" in told
    assert "not run   predict: nothing was promoted" in told
    assert "@champion" not in told and "--model models:/digits/2" in told
    assert summary.exit_code == 3
    assert Summary(outcomes=outcomes(tuned=40, promote=REFUSED), not_run={"predict": "x"}).exit_code == 1


def test_a_refused_version_beside_a_champion_is_said_and_is_no_failure() -> None:
    refused = {
        "passed": False,
        "reason": "models:/digits/2 against models:/digits/1: a tie",
        "champion": "models:/digits/1",
    }
    summary = Summary(outcomes=outcomes(promote=refused))
    assert "REFUSED   models:/digits/2 against models:/digits/1: a tie; models:/digits/1 stays champion" in ending(
        summary
    )
    assert summary.exit_code == 0


def test_what_was_reached_is_shown_also_when_a_step_failed() -> None:
    done = {name: one for name, one in outcomes().items() if name in {"pretrain", "finetune"}}
    summary = Summary(outcomes=done)
    assert [row[0] for row in summary.rows()] == ["pretrain", "finetune"]
    assert summary.accuracies() == ["  Fashion-MNIST, pretrained         0.881  [0.875, 0.887]"]


def test_the_figures_for_programs_are_json() -> None:
    kept = json.loads(json.dumps(figures(Summary(outcomes=outcomes(), seconds=61.23))))
    assert kept["claims"] == pytest.approx(
        {"upstream_top1": 0.881, "downstream_top1": 389 / 399, "gain_over_scratch": 103 / 399,
         "pretrain_images_per_second": 1103.4}
    )  # fmt: skip
    assert kept["steps"]["evaluate_scratch"]["reused"] is True and kept["exit_code"] == 0
