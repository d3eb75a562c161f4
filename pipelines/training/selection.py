"""Which validation was the best so far, and whether training still gets anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines.training.config import BestConfig

__all__ = ["Selection"]


class Selection:
    """Kept in the checkpoints: a resumed run stops where the uninterrupted one would have."""

    def __init__(self, config: BestConfig | None) -> None:
        self.config = config
        self.value: float | None = None
        self.step: int | None = None
        self.without_best = 0  # Measurements since the best one.

    def take(self, metrics: Mapping[str, float], step: int) -> bool:
        """Whether this measurement is the best so far; of equals the first stays."""
        if self.config is None or (self.step is not None and step <= self.step):
            return False
        value = metrics[self.config.metric]
        sign = -1.0 if self.config.metric.endswith("/loss") else 1.0
        # Not `<=`: a value that is not a number is never the best.
        if self.value is not None and not sign * value > sign * self.value:
            self.without_best += 1
            return False
        self.value, self.step, self.without_best = value, step, 0
        return True

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end; only measurements that were taken count."""
        patience = self.config.patience if self.config is not None else None
        return patience is not None and self.without_best >= patience

    @property
    def averaged(self) -> bool:
        """Whether it is the average that is measured."""
        return self.config is not None and self.config.metric.startswith("ema/")

    def to_json(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "without_best": self.without_best}

    def load(self, stored: Mapping[str, Any]) -> None:
        self.value, self.step = stored.get("value"), stored.get("step")
        self.without_best = int(stored.get("without_best", 0))
