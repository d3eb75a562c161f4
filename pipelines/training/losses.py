"""Losses, summed over samples: divided by `batch_size` they add up to the same over any split of a batch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["count_correct", "loss_sum", "targets_of"]


def targets_of(labels: Tensor, num_classes: int, label_smoothing: float) -> Tensor:
    """Target distribution, float32 (B, K). `labels`: int64 (B,) class numbers, or float (B, K) multi-hot."""
    hot = F.one_hot(labels, num_classes).float() if labels.ndim == 1 else labels.float()
    if not label_smoothing:
        return hot
    return hot * (1.0 - label_smoothing) + label_smoothing / num_classes


def loss_sum(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    kind: Literal["softmax", "sigmoid"] = "softmax",
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Weighted sum over samples, a scalar. Sigmoid cross-entropy is summed over classes too, as big_vision has it.

    `class_weights` (K,) multiply the terms of their classes, as in torch's cross-entropy with `weight`; the sum is not
    divided by them.
    """
    logits = logits.float()  # Under autocast the logits are bf16: their log-sum-exp would lose three digits.
    if kind == "softmax" and labels.ndim == 1:
        each = F.cross_entropy(logits, labels, weight=class_weights, reduction="none", label_smoothing=label_smoothing)
    elif kind == "softmax":
        targets = targets_of(labels, logits.shape[1], label_smoothing)
        targets = targets if class_weights is None else targets * class_weights
        each = -(targets * F.log_softmax(logits, dim=1)).sum(dim=1)
    else:
        targets = targets_of(labels, logits.shape[1], label_smoothing)
        terms = F.binary_cross_entropy_with_logits(logits, targets, weight=class_weights, reduction="none")
        each = terms.sum(dim=1)
    return torch.sum(each * weights)


def count_correct(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Weighted number of right answers; with multi-hot labels the best class must be one of them."""
    best = logits.argmax(dim=1)
    right = best == labels if labels.ndim == 1 else labels.gather(1, best[:, None])[:, 0] > 0
    return (right * weights).sum()
