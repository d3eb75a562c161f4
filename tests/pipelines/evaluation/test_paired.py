"""The paired test holds its level, finds what is there, and tells how many images would decide."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from pipelines.evaluation.paired import compare, images_needed


def outcomes(both: int, won: int, lost: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    candidate = np.array([True] * (both + won) + [False] * (lost + neither))
    champion = np.array([True] * both + [False] * won + [True] * lost + [False] * neither)
    return candidate, champion


@given(st.integers(0, 50), st.integers(0, 40), st.integers(0, 40), st.integers(0, 50))
def test_p_value_is_the_exact_binomial(both: int, won: int, lost: int, neither: int) -> None:
    if both + won + lost + neither == 0:
        return
    result = compare(*outcomes(both, won, lost, neither))
    expected = binomtest(won, won + lost, alternative="greater").pvalue if won + lost else 1.0
    assert result.p_value == pytest.approx(expected, rel=1e-9)
    assert result.interval[0] <= result.difference <= result.interval[1]


def test_equal_models_are_never_better() -> None:
    candidate, _ = outcomes(30, 5, 0, 5)
    result = compare(candidate, candidate)
    assert (result.p_value, result.difference, result.is_better) == (1.0, 0.0, False)


def test_five_disagreements_decide_at_the_earliest() -> None:
    assert not compare(*outcomes(10, 4, 0, 0)).is_better
    assert compare(*outcomes(10, 5, 0, 0)).is_better


def test_the_level_is_held_when_both_are_equal() -> None:
    rng = np.random.default_rng(1)
    found = sum(compare(rng.random(200) < 0.8, rng.random(200) < 0.8).is_better for _ in range(1000))
    assert found / 1000 < 0.06


@pytest.mark.parametrize(("won", "lost"), [(0.06, 0.04), (0.10, 0.05), (0.03, 0.01)])
def test_the_number_of_images_gives_the_promised_power(won: float, lost: float) -> None:
    n = images_needed(won, lost)
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(400):
        draw = rng.random(n)
        found += compare(draw < won, (draw >= won) & (draw < won + lost)).is_better
    assert 0.70 < found / 400 < 0.90


def test_no_gain_asks_for_the_images_that_show_one_point() -> None:
    assert images_needed(0.05, 0.05) == images_needed(0.04, 0.06) > 5000
    assert images_needed(0.0, 0.0) >= 500


def test_lists_that_do_not_pair_are_an_error() -> None:
    with pytest.raises(ValueError, match="equally long"):
        compare(np.ones(3, bool), np.ones(4, bool))


def test_the_comparison_reads_as_a_sentence() -> None:
    text = str(compare(*outcomes(80, 12, 2, 6)))
    assert "difference +0.1000" in text
    assert "n=100 images, 12 won and 2 lost" in text
