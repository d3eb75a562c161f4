"""Learning rate over the run, a pure function of the step.

Progress counts from the end of warm-up, as in big_vision (utils.py, create_learning_rate_schedule).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pipelines.config import Strict

__all__ = ["ScheduleConfig", "learning_rate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig(Strict):
    """Shape of the learning rate between warm-up and the last step."""

    decay: Literal["cosine", "linear", "constant"] = "cosine"  # From the peak down to end_lr.
    warmup_steps: int = 0  # Steps of linear rise from 0.
    end_lr: float = 0.0  # Where the decay ends; the paper's linear decay ends at 1e-5.

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} is negative; 0 disables warm-up")
        if self.decay == "constant" and self.end_lr:
            raise ValueError(
                f"end_lr={self.end_lr} has no effect with decay: constant; remove it or choose cosine or linear"
            )

    def check(self, total_steps: int) -> None:
        """Warm-up must leave room for the rest."""
        if self.warmup_steps >= total_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps:,} is not below the {total_steps:,} steps of the training: "
                "the learning rate would never reach its peak; train longer (train.epochs or train.total_steps), "
                f"lower train.batch_size, or shorten the warm-up: --schedule.warmup-steps {max(0, total_steps // 10)}"
            )


def learning_rate(schedule: ScheduleConfig, peak: float, step: int, total_steps: int) -> float:
    """The rate for update `step`, counted from 0."""
    progress = (step - schedule.warmup_steps) / max(1, total_steps - schedule.warmup_steps)
    progress = min(1.0, max(0.0, progress))
    match schedule.decay:
        case "cosine":
            rate = schedule.end_lr + (peak - schedule.end_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))
        case "linear":
            rate = schedule.end_lr + (peak - schedule.end_lr) * (1.0 - progress)
        case "constant":
            rate = peak
    if schedule.warmup_steps:
        rate *= min(1.0, step / schedule.warmup_steps)
    return rate
