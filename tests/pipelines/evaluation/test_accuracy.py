"""Accuracy is exact: whatever the batches and the padding, and equal to a plain second computation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from pipelines.evaluation.accuracy import UNKNOWN, Accuracy, class_map, ranks, wilson


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    classes=st.integers(1, 12),
    batch=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
)
def test_batches_and_padding_change_nothing(n: int, classes: int, batch: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 3, (n, classes)).astype(np.float32)  # integers: many ties
    labels = rng.integers(0, classes, n)
    accuracy = Accuracy(classes)
    for start in range(0, n, batch):
        rows = slice(start, min(start + batch, n))
        padding = batch - len(labels[rows])
        accuracy.update(
            torch.tensor(np.concatenate([logits[rows], np.full((padding, classes), np.nan)]).astype(np.float32)),
            torch.tensor(np.concatenate([labels[rows], np.zeros(padding, np.int64)])),
            torch.tensor([1.0] * (batch - padding) + [0.0] * padding),
            torch.tensor([*range(start, start + batch - padding), *[-1] * padding]),
        )
    scores, rows_ = accuracy.scores(), accuracy.predictions()
    order = [sorted(range(classes), key=lambda k: (-logits[i, k], k)) for i in range(n)]
    assert scores.n == n
    assert scores.num_unreadable == 0
    assert scores.top1 == pytest.approx(np.mean([order[i][0] == labels[i] for i in range(n)]))
    assert scores.top5 == pytest.approx(np.mean([labels[i] in order[i][:5] for i in range(n)]))
    assert rows_.rank.tolist() == [order[i].index(labels[i]) for i in range(n)]
    assert rows_.sample_id.tolist() == list(range(n))
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(labels)).item()
    assert scores.loss == pytest.approx(expected, rel=1e-5, abs=1e-6)
    cell_labels, cell_predictions, counts = accuracy.confusion()
    assert counts.sum() == n
    assert counts[cell_labels == cell_predictions].sum() == pytest.approx(scores.top1 * n)


def test_unreadable_samples_are_counted_apart() -> None:
    accuracy = Accuracy(2)
    accuracy.update(np.eye(2)[[0, 1, 0]], np.array([0, 0, 0]), np.array([1.0, 0.0, 0.0]), np.array([4, 5, -1]))
    scores = accuracy.scores()
    assert (scores.n, scores.num_unreadable, scores.top1) == (1, 1, 1.0)
    assert math.isnan(scores.per_class[1])


def test_a_class_that_the_model_does_not_have_is_never_right() -> None:
    names = class_map(["cat", "dog", "newt"], ["dog", "cat"])
    assert names.tolist() == [1, 0, UNKNOWN]
    accuracy = Accuracy(2)
    accuracy.update(np.array([[5.0, 0.0], [5.0, 0.0]]), np.array([UNKNOWN, 0]), np.ones(2), np.arange(2))
    scores = accuracy.scores()
    assert (scores.n, scores.top1, scores.top5) == (2, 0.5, 0.5)
    assert scores.loss == pytest.approx(math.log1p(math.exp(-5.0)), rel=1e-4)


def test_logits_that_are_not_finite_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"1 of 2 rows of logits are not finite, first for sample 8"):
        Accuracy(2).update(np.array([[0.0, 1.0], [0.0, math.nan]]), np.array([0, 0]), np.ones(2), np.array([7, 8]))


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no sample to score"):
        Accuracy(2).scores()


def test_sigmoid_loss_is_the_sum_over_classes() -> None:
    logits = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    labels = np.arange(6) % 4
    accuracy = Accuracy(4, "sigmoid")
    accuracy.update(logits, labels, np.ones(6), np.arange(6))
    target = torch.nn.functional.one_hot(torch.tensor(labels), 4).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits), target, reduction="none")
    assert accuracy.scores().loss == pytest.approx(expected.sum(1).mean().item(), rel=1e-5)


def test_ranks_break_ties_by_class_index() -> None:
    assert ranks(np.zeros((3, 3)), np.array([0, 1, 2])).tolist() == [0, 1, 2]


@given(n=st.integers(1, 3000), share=st.floats(0, 1))
def test_wilson_equals_scipy(n: int, share: float) -> None:
    successes = round(n * share)
    reference = binomtest(successes, n).proportion_ci(0.95, "wilson")
    assert wilson(successes, n) == pytest.approx((reference.low, reference.high), abs=1e-9)
