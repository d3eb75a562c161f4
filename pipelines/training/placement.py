"""How many processes train, and on what device: decided once at the start, and said with its reason."""

from __future__ import annotations

import time
from dataclasses import dataclass

from pipelines.training.config import WorkerConfig

__all__ = ["Patience", "Placement", "place"]

FIRST_WORD_SECONDS = 45.0  # Starting the workers takes half of it on a busy laptop.
NEXT_WORD_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers of a run."""

    count: int
    use_gpu: bool  # One GPU each.
    why: str  # For the user.
    waits: bool = False  # The cluster does not show all of it yet.

    def __str__(self) -> str:
        kind = "GPU" if self.use_gpu else "CPU"
        return f"{self.count} {kind} worker{'s' if self.count != 1 else ''} ({self.why})"

    @property
    def resources(self) -> str:
        """What the cluster must have free for all of them."""
        return f"{self.count} GPU{'s' if self.count != 1 else ''}" if self.use_gpu else f"{self.count} CPU workers"


def place(workers: WorkerConfig, cpus: float, gpus: float, *, can_grow: bool) -> Placement:
    """From the recipe and what the cluster shows. `can_grow`: nodes may still come, as on an autoscaling cluster.

    ValueError: the recipe asks for what this cluster does not have and will not get.
    """
    shown = int(gpus)
    if workers.device == "cuda":
        return _on_gpus(workers.count, shown, can_grow)
    if workers.device == "auto" and shown:
        if workers.count is not None and workers.count > shown:
            later = "; workers.device: cuda waits until the cluster has grown" if can_grow else ""
            raise ValueError(
                f"workers.count={workers.count} is more than the cluster's {shown} GPUs; nearest: {shown}{later}"
            )
        return Placement(workers.count or shown, True, f"the cluster shows {_gpus(shown)}")
    count = workers.count or min(2, max(1, int(cpus)))
    if workers.device == "cpu":
        return Placement(count, False, "workers.device is cpu")
    later = "; workers.device: cuda waits for some to come" if can_grow else ""
    return Placement(count, False, f"the cluster shows no GPU{later}")


def _on_gpus(count: int | None, shown: int, can_grow: bool) -> Placement:
    if shown >= (count or 1):
        return Placement(count or shown, True, f"the cluster shows {_gpus(shown)}")
    if not can_grow:
        raise ValueError(
            f"workers.device=cuda with workers.count={count or 1}: Ray shows {_gpus(shown)} on this machine; take "
            "workers.device: auto or cpu here, or point RAY_ADDRESS at a cluster with GPUs"
        )
    if count is None:
        raise ValueError(
            "workers.device=cuda: the cluster shows no GPU yet, so say how many to wait for, as in workers.count: 8"
        )
    return Placement(count, True, f"workers.device is cuda; the cluster shows {_gpus(shown)} yet", waits=True)


def _gpus(count: int) -> str:
    return f"{count or 'no'} GPU{'s' if count > 1 else ''}"


class Patience:
    """What to say while the workers do not start: Ray itself waits for ever, without a word."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._next = time.monotonic() + FIRST_WORD_SECONDS

    def is_due(self) -> bool:
        return time.monotonic() >= self._next

    def word(self, cpus: float, gpus: float) -> str:
        """The sentence, given what the cluster shows now; the next one is due much later."""
        self._next = time.monotonic() + NEXT_WORD_SECONDS
        return (
            f"waiting for {self._placement.resources}: the cluster shows {cpus:g} CPUs and {gpus:g} GPUs, some of them "
            "in use perhaps; `ray status` says what it waits for, Ctrl-C gives up"
        )
