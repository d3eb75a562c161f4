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

    # cosine and linear: from the peak down to end_lr. rsqrt: 1 / sqrt(1 + t / timescale), needs no known end.
    decay: Literal["cosine", "linear", "rsqrt", "constant"] = "cosine"
    warmup_steps: int = 0  # Steps of linear rise from 0.
    end_lr: float = 0.0  # Where the decay ends; the paper's linear decay ends at 1e-5.
    timescale: int = 10_000  # rsqrt: steps after which the rate is the peak / sqrt(2).
    cooldown_steps: int = 0  # rsqrt and constant: steps of linear fall to 0 at the very end (arXiv 2106.04560).

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} is negative; 0 disables warm-up")
        if not 0 <= self.end_lr < math.inf:
            raise ValueError(f"end_lr={self.end_lr} is not 0 or more; below 0 the weights would go uphill")
        endless = self.decay in ("constant", "rsqrt")
        if endless and self.end_lr:
            raise ValueError(
                f"end_lr={self.end_lr} has no effect with decay: {self.decay}; remove it or choose cosine or linear"
            )
        if self.cooldown_steps < 0:
            raise ValueError(f"cooldown_steps={self.cooldown_steps} is negative; 0 disables the cooldown")
        if self.cooldown_steps and not endless:
            raise ValueError(
                f"cooldown_steps={self.cooldown_steps} has no effect with decay: {self.decay}, which ends at end_lr;"
                " remove it or choose rsqrt or constant"
            )
        if self.timescale < 1:
            raise ValueError(f"timescale={self.timescale} is less than one step; 10000 is usual")
        if self.timescale != 10_000 and self.decay != "rsqrt":
            raise ValueError(f"timescale={self.timescale} has no effect with decay: {self.decay}; it belongs to rsqrt")

    def check(self, total_steps: int) -> None:
        """Warm-up and cooldown must leave room for the rest."""
        if self.warmup_steps >= total_steps:
            raise ValueError(
                f"schedule.warmup_steps={self.warmup_steps:,} is not below the {total_steps:,} steps of the training: "
                "the learning rate would never reach its peak; train longer (train.epochs or train.total_steps), "
                f"lower train.batch_size, or shorten the warm-up: --schedule.warmup-steps {max(0, total_steps // 10)}"
            )
        if self.cooldown_steps and self.warmup_steps + self.cooldown_steps >= total_steps:
            room = total_steps - self.warmup_steps - 1  # That a cooldown may take, after the warm-up and one step.
            remedy = (
                f"nearest usual cooldown: {min(max(1, total_steps // 5), room)}"
                if room > 0
                else "leave the cooldown out, or train longer"
            )
            raise ValueError(
                f"warmup_steps={self.warmup_steps} and cooldown_steps={self.cooldown_steps} leave none of"
                f" total_steps={total_steps} between them; {remedy}"
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
        case "rsqrt":
            rate = peak / math.sqrt(1.0 + max(0, step - schedule.warmup_steps) / schedule.timescale)
        case "constant":
            rate = peak
    if schedule.cooldown_steps:
        rate *= min(1.0, (total_steps - step) / schedule.cooldown_steps)
    if schedule.warmup_steps:
        rate *= min(1.0, step / schedule.warmup_steps)
    return rate
