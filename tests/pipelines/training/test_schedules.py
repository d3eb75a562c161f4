from __future__ import annotations

import math

import pytest

from pipelines.training.schedules import ScheduleConfig, learning_rate


def test_warm_up_rises_linearly_from_zero_to_the_peak() -> None:
    schedule = ScheduleConfig(decay="constant", warmup_steps=4)
    assert [learning_rate(schedule, 2.0, step, 100) for step in range(6)] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.0]


def test_cosine_is_half_way_in_the_middle_and_ends_where_it_is_told() -> None:
    schedule = ScheduleConfig(decay="cosine", warmup_steps=10, end_lr=0.1)
    assert learning_rate(schedule, 1.0, 10, 110) == pytest.approx(1.0)
    assert learning_rate(schedule, 1.0, 60, 110) == pytest.approx(0.55)
    assert learning_rate(schedule, 1.0, 110, 110) == pytest.approx(0.1)
    assert learning_rate(schedule, 1.0, 35, 110) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_linear_decay_is_a_straight_line_to_end_lr() -> None:
    schedule = ScheduleConfig(decay="linear", end_lr=1e-5)
    assert learning_rate(schedule, 8e-4, 0, 100) == pytest.approx(8e-4)
    assert learning_rate(schedule, 8e-4, 50, 100) == pytest.approx((8e-4 + 1e-5) / 2)
    assert learning_rate(schedule, 8e-4, 100, 100) == pytest.approx(1e-5)


@pytest.mark.parametrize(
    ("values", "text"),
    [({"warmup_steps": -1}, "warmup_steps=-1"), ({"decay": "constant", "end_lr": 0.1}, "has no effect")],
)
def test_a_setting_that_cannot_be_meant_is_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ScheduleConfig(**values)  # type: ignore[arg-type]


def test_warm_up_longer_than_the_run_is_refused_with_a_nearer_value() -> None:
    with pytest.raises(ValueError, match=r"warmup_steps=100 is not below the 50 steps.*--schedule.warmup-steps 5$"):
        ScheduleConfig(warmup_steps=100).check(50)


def test_rsqrt_falls_by_the_root_of_its_timescale_and_cools_down_to_nothing() -> None:
    schedule = ScheduleConfig(decay="rsqrt", warmup_steps=10, timescale=100, cooldown_steps=50)
    assert learning_rate(schedule, 2.0, 5, 1000) == pytest.approx(1.0)
    assert learning_rate(schedule, 2.0, 10, 1000) == pytest.approx(2.0)
    assert learning_rate(schedule, 2.0, 110, 1000) == pytest.approx(2.0 / math.sqrt(2))
    assert learning_rate(schedule, 2.0, 310, 1000) == pytest.approx(1.0)
    assert learning_rate(schedule, 2.0, 975, 1000) == pytest.approx(0.5 * 2.0 / math.sqrt(10.65))
    assert learning_rate(schedule, 2.0, 1000, 1000) == 0.0


def test_a_constant_rate_may_cool_down_at_the_end() -> None:
    schedule = ScheduleConfig(decay="constant", cooldown_steps=10)
    assert [learning_rate(schedule, 1.0, step, 100) for step in (0, 90, 95, 99)] == pytest.approx([1, 1, 0.5, 0.1])


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"decay": "cosine", "cooldown_steps": 5}, "cooldown_steps=5 has no effect with decay: cosine"),
        ({"decay": "linear", "timescale": 5}, "timescale=5 has no effect"),
        ({"decay": "rsqrt", "end_lr": 0.1}, "end_lr=0.1 has no effect with decay: rsqrt"),
    ],
)
def test_a_setting_of_another_decay_is_refused(values: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ScheduleConfig(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize("end_lr", [-1.0, float("nan"), float("inf")])
def test_an_end_that_goes_uphill_is_refused(end_lr: float) -> None:
    with pytest.raises(ValueError, match=r"end_lr=.* is not 0 or more"):
        ScheduleConfig(decay="cosine", end_lr=end_lr)


@pytest.mark.parametrize(("warmup", "total", "remedy"), [(45, 50, "nearest usual cooldown: 4"), (2, 3, "leave the")])
def test_the_cooldown_that_is_offered_fits(warmup: int, total: int, remedy: str) -> None:
    given = ScheduleConfig(decay="constant", warmup_steps=warmup, cooldown_steps=10)
    with pytest.raises(ValueError, match=remedy):
        given.check(total)


def test_a_warm_up_that_never_ends_is_said_before_any_cooldown() -> None:
    with pytest.raises(ValueError, match="the learning rate would never reach its peak"):
        ScheduleConfig(decay="constant", warmup_steps=50, cooldown_steps=10).check(50)


def test_a_cooldown_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="leave none of total_steps=50"):
        ScheduleConfig(decay="rsqrt", warmup_steps=20, cooldown_steps=40).check(50)
