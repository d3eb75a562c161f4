"""Accuracy on held-out samples: exact whatever the padding, with its interval, per class and as a confusion matrix.

Ties of logits go to the lower class index, so that equal inputs give equal results on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Accuracy", "Predictions", "Scores", "ranks", "wilson"]

UNKNOWN = -1  # Label of a class that the model does not have: never right, and without a loss.


@dataclass(frozen=True, slots=True)
class Predictions:
    """One entry a sample, in the order they were added."""

    sample_id: NDArray[np.int64]
    label: NDArray[np.int64]  # In the model's classes; UNKNOWN where it has no such class.
    prediction: NDArray[np.int64]
    probability: NDArray[np.float32]  # Of the predicted class.
    rank: NDArray[np.int32]  # Place of the true class among the logits, 0 = first; right in top k means rank < k.
    loss: NDArray[np.float32]  # NaN where the label is UNKNOWN.

    def __len__(self) -> int:
        return len(self.sample_id)


@dataclass(frozen=True, slots=True)
class Scores:
    """What one evaluation says."""

    n: int  # Samples that count.
    num_unreadable: int  # Samples of the split that could not be decoded: counted apart, not in `n`.
    top1: float
    top5: float
    loss: float
    top1_interval: tuple[float, float]  # Wilson, 95 %, two-sided.
    top5_interval: tuple[float, float]
    per_class: NDArray[np.float64]  # Accuracy by true class; NaN for a class without a sample.
    mean_per_class: float


class Accuracy:
    """Collects batches; rows of weight 0 count for nothing (padding) or as unreadable (a sample that is there)."""

    def __init__(self, num_classes: int, activation: str = "softmax") -> None:
        if activation not in {"softmax", "sigmoid"}:
            raise ValueError(f"activation={activation!r}; known: softmax, sigmoid")
        self.num_classes, self.activation = num_classes, activation
        self.num_unreadable = 0
        self._parts: list[Predictions] = []

    def update(self, logits: Any, labels: Any, weights: Any, sample_ids: Any) -> Predictions:
        """logits (B, K), labels (B,), weights (B,), sample_ids (B,): tensors or arrays. Returns this batch's rows."""
        logits, labels, weights, ids = (_array(x) for x in (logits, labels, weights, sample_ids))
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(f"logits have shape {logits.shape}; (B, {self.num_classes}) expected")
        counts = weights > 0
        self.num_unreadable += int(((ids >= 0) & ~counts).sum())
        logits, labels, ids = logits[counts].astype(np.float64), labels[counts].astype(np.int64), ids[counts]
        if labels.size and (labels.max() >= self.num_classes or labels.min() < UNKNOWN):
            raise ValueError(f"labels reach {labels.max()}; the model has {self.num_classes} classes")
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            raise ValueError(
                f"{int((~finite).sum())} of {len(logits)} rows of logits are not finite, first for sample "
                f"{int(ids[~finite][0])}; the weights are broken or the precision is too low"
            )
        part = _predict(logits, labels, ids, self.activation)
        self._parts.append(part)
        return part

    def predictions(self) -> Predictions:
        if not self._parts:
            empty = np.zeros(0)
            return Predictions(*(empty.astype(t) for t in ("i8", "i8", "i8", "f4", "i4", "f4")))
        fields = Predictions.__slots__
        return Predictions(*(np.concatenate([getattr(part, name) for part in self._parts]) for name in fields))

    def scores(self) -> Scores:
        rows = self.predictions()
        n = len(rows)
        if n == 0:
            raise ValueError(f"no sample to score ({self.num_unreadable} unreadable)")
        right1, right5 = rows.rank < 1, rows.rank < 5
        known = rows.label != UNKNOWN
        total = np.bincount(rows.label[known], minlength=self.num_classes)
        right = np.bincount(rows.label[known & right1], minlength=self.num_classes)
        with np.errstate(invalid="ignore", divide="ignore"):
            per_class = np.where(total > 0, right / total, np.nan)
        return Scores(
            n=n,
            num_unreadable=self.num_unreadable,
            top1=float(right1.mean()),
            top5=float(right5.mean()),
            loss=float(rows.loss[known].astype(np.float64).mean()) if known.any() else math.nan,
            top1_interval=wilson(int(right1.sum()), n),
            top5_interval=wilson(int(right5.sum()), n),
            per_class=per_class,
            mean_per_class=float(np.nanmean(per_class)) if known.any() else 0.0,
        )

    def confusion(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """(label, prediction, count) of the cells that are not empty: 21k classes in full would take 3.5 GB."""
        rows = self.predictions()
        cells, counts = np.unique(np.stack([rows.label, rows.prediction]), axis=1, return_counts=True)
        return cells[0], cells[1], counts.astype(np.int64)


def ranks(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.int32]:
    """Number of classes before the true one: larger logits, and equal ones of a lower index."""
    known = labels != UNKNOWN
    own = np.take_along_axis(logits, np.where(known, labels, 0)[:, None], axis=1)
    before = (logits > own) | ((logits == own) & (np.arange(logits.shape[1]) < labels[:, None]))
    place: NDArray[np.int32] = np.where(known, before.sum(axis=1), logits.shape[1] + 5).astype(np.int32)
    return place


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927): holds its level also near 0 and 1, where the usual one collapses."""
    if n < 1:
        return 0.0, 1.0
    z = _z((1 + confidence) / 2)
    share = successes / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def _z(quantile: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(quantile)


def _predict(
    logits: NDArray[np.float64], labels: NDArray[np.int64], ids: NDArray[np.int64], activation: str
) -> Predictions:
    rows = np.arange(len(logits))
    prediction = logits.argmax(axis=1) if len(logits) else np.zeros(0, np.int64)
    known = labels != UNKNOWN
    safe = np.where(known, labels, 0)
    if activation == "softmax":
        shifted = logits - logits.max(axis=1, keepdims=True, initial=-np.inf)
        log_chances = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        chance = np.exp(log_chances[rows, prediction])
        loss = -log_chances[rows, safe]
    else:
        chance = 1 / (1 + np.exp(-logits[rows, prediction]))
        # Binary cross-entropy summed over classes: softplus(logit) - logit of the true class.
        loss = np.logaddexp(0, logits).sum(axis=1) - logits[rows, safe]
    return Predictions(
        sample_id=ids.astype(np.int64),
        label=labels,
        prediction=prediction.astype(np.int64),
        probability=chance.astype(np.float32),
        rank=ranks(logits, labels),
        loss=np.where(known, loss, np.nan).astype(np.float32),
    )


def _array(values: Any) -> NDArray[Any]:
    if hasattr(values, "detach"):
        values = values.detach().float().cpu() if values.is_floating_point() else values.cpu()
    return np.asarray(values)


def class_map(corpus_classes: Sequence[str], model_classes: Sequence[str]) -> NDArray[np.int64]:
    """Index in the model's classes for each class of the corpus, by name; UNKNOWN where the model has none."""
    places = {name: index for index, name in enumerate(model_classes)}
    return np.array([places.get(name, UNKNOWN) for name in corpus_classes], dtype=np.int64)
