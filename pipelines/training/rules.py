"""What settings of a recipe ask of each other. Checked before anything starts. No torch in here."""

from __future__ import annotations

from pipelines.training.config import (
    AnyOptimizer,
    Lamb,
    MuonAdamW,
    ParallelConfig,
    ScheduleFree,
    TrainConfig,
    ValidationConfig,
    WorkerConfig,
)
from pipelines.training.schedules import ScheduleConfig

__all__ = ["check_together", "check_workers"]


def check_together(
    train: TrainConfig,
    optimizer: AnyOptimizer,
    schedule: ScheduleConfig,
    validation: ValidationConfig,
    parallel: ParallelConfig,
    workers: WorkerConfig | None = None,
) -> None:
    """Raises ValueError with the remedy for the first pair that does not fit."""
    if schedule.end_lr > optimizer.peak_lr:
        raise ValueError(
            f"schedule.end_lr={schedule.end_lr} is above optimizer.peak_lr={optimizer.peak_lr}: the rate would rise to"
            " the end; lower it, 0 is usual"
        )
    best = validation.best
    if train.export == "best" and best is None:
        raise ValueError("train.export: best needs validation.best; add validation: {best: {}}, or export: last")
    if best is not None and best.metric.startswith("ema/") and train.ema is None:
        raise ValueError(f"validation.best.metric={best.metric} needs an average; add train.ema, or take val/top1")
    if isinstance(optimizer, ScheduleFree):
        if schedule.decay != "constant" or schedule.cooldown_steps:
            raise ValueError(
                f"schedule.decay={schedule.decay} fights optimizer kind: schedule_free, whose average takes the place"
                " of a decay; set decay: constant without cooldown_steps"
            )
        if train.ema is not None:
            raise ValueError("train.ema averages what optimizer kind: schedule_free averages itself; remove ema")
    if isinstance(optimizer, MuonAdamW | Lamb) and parallel.kind != "ddp":
        whole = "matrices" if isinstance(optimizer, MuonAdamW) else "tensors"
        raise ValueError(
            f"optimizer kind: {optimizer.kind} needs whole {whole}, parallel.kind={parallel.kind} cuts them; use ddp or"
            " adamw"
        )
    if workers is not None and workers.count is not None:
        check_workers(
            parallel, *(workers.count if isinstance(workers.count, tuple) else (workers.count, workers.count))
        )


def check_workers(parallel: ParallelConfig, fewest: int, most: int) -> None:
    """Whether any number of workers from `fewest` to `most` can share the weights as `parallel` asks."""
    if parallel.kind == "ddp":
        return
    if fewest < 2:
        raise ValueError(
            f"parallel.kind={parallel.kind} cuts the weights over workers and there may be one alone; give"
            f" workers.count: {2 if fewest == most else [2, max(2, most)]} or more, or take kind: ddp"
        )
    if parallel.replicas is not None and any(count % parallel.replicas for count in range(fewest, most + 1)):
        which = f"{fewest} workers" if fewest == most else f"every number of workers from {fewest} to {most}"
        raise ValueError(
            f"parallel.replicas={parallel.replicas} does not divide {which}; give the number of nodes, and a fixed"
            " workers.count that it divides"
        )
