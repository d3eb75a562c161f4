"""The count of what was lost and repeated must be able to find both."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.chaos.trace import Line, count

SAMPLES, BATCH, STEPS = 12, 4, 6  # Two epochs of three steps.


def whole(start: int = 1, steps: range = range(STEPS), ranks: int = 2) -> list[Line]:
    lines = []
    for step in steps:
        ids = [(step % 3) * BATCH + place for place in range(BATCH)]
        lines += [Line((1, start), step, tuple(ids[rank::ranks]), 0.0) for rank in range(ranks)]
    return lines


def counted(lines: list[Line]) -> tuple[int, int]:
    found = count(lines, SAMPLES, BATCH, STEPS)
    return found.lost, found.repeated


def test_nothing_is_lost_in_a_whole_run_whatever_was_redone_and_by_however_many() -> None:
    assert counted(whole()) == (0, 0)
    resumed = [*whole(1, range(5)), *whole(2, range(3, STEPS), ranks=1)]
    assert counted(resumed) == (0, 0)
    assert count(resumed, SAMPLES, BATCH, STEPS).redone == {(1, 1): 0, (1, 2): 2}


def test_a_step_that_is_taken_out_is_missed() -> None:
    assert counted([line for line in whole() if line.step != 4]) == (4, 0)


def test_the_part_of_one_rank_that_is_taken_out_is_missed() -> None:
    assert counted(whole()[:-1]) == (2, 0)


def test_a_step_in_the_place_of_another_is_lost_and_repeated() -> None:
    lines = whole()
    assert counted([replace(line, ids=lines[line.step % 2].ids) if line.step == 2 else line for line in lines]) == (
        4,
        4,
    )


def test_what_a_later_start_left_out_is_missed_although_an_earlier_one_had_it() -> None:
    later = [line for line in whole(2, range(3, STEPS)) if (line.step, line.ids[0]) != (3, 0)]
    assert counted([*whole(1, range(5)), *later]) == (2, 0)


def test_what_are_no_whole_epochs_is_refused() -> None:
    with pytest.raises(ValueError, match="no whole epochs"):
        count(whole(), SAMPLES, BATCH, 5)
