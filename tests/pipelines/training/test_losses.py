from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipelines.training.losses import count_correct, loss_sum


def some(seed: int, size: int = 12, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    weights = (torch.rand(size, generator=source) > 0.2).float()
    logits = torch.randn(size, classes, generator=source, dtype=torch.float64)
    return logits.float(), torch.randint(0, classes, (size,), generator=source), weights


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 1000),
    cuts=st.lists(st.integers(0, 12), max_size=4),
    kind=st.sampled_from(["softmax", "sigmoid"]),
)
def test_any_split_of_a_batch_adds_up_to_the_same(seed: int, cuts: list[int], kind: str) -> None:
    logits, labels, weights = some(seed)
    bounds = [0, *sorted(cuts), 12]
    parts = [
        loss_sum(logits[a:b], labels[a:b], weights[a:b], kind, 0.1)  # type: ignore[arg-type]
        for a, b in itertools.pairwise(bounds)
    ]
    whole = loss_sum(logits, labels, weights, kind, 0.1)  # type: ignore[arg-type]
    torch.testing.assert_close(torch.stack(parts).sum(), whole)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_numbers_and_their_one_hot_rows_give_the_same_loss(smoothing: float) -> None:
    logits, labels, weights = some(1)
    hot = F.one_hot(labels, 5).float()
    for kind in ("softmax", "sigmoid"):
        torch.testing.assert_close(
            loss_sum(logits, labels, weights, kind, smoothing),  # type: ignore[arg-type]
            loss_sum(logits, hot, weights, kind, smoothing),  # type: ignore[arg-type]
        )


def test_a_sample_of_weight_zero_counts_nothing_whatever_it_holds() -> None:
    logits, labels, _ = some(2)
    weights = torch.ones(12)
    weights[3] = 0
    changed = logits.clone()
    changed[3] = 1000.0
    assert loss_sum(logits, labels, weights) == loss_sum(changed, labels, weights)


def test_a_multi_hot_answer_is_right_when_the_best_class_is_one_of_them() -> None:
    logits = torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 3.0]])
    labels = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert count_correct(logits, labels, torch.ones(2)) == 1
