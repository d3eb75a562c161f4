"""How many processes train, and on what device: decided at every start of the workers, and said with its reason."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from pipelines.training.config import WorkerConfig

__all__ = ["MakingWay", "Node", "Patience", "Placement", "count_room", "place"]

FIRST_WORD_SECONDS = 45.0  # Starting the workers takes half of it on a busy laptop.
NEXT_WORD_SECONDS = 300.0
STEADY_SECONDS = 5.0  # New room counts once it has stood for so long.


@dataclass(frozen=True, slots=True)
class Placement:
    """The workers of a run."""

    count: int
    use_gpu: bool  # One GPU each.
    why: str  # For the user.
    waits: bool = False  # The cluster does not show all of it yet.
    limits: tuple[int, int] | None = None  # Fewest and most, where the recipe gives a range.

    def __str__(self) -> str:
        kind = "GPU" if self.use_gpu else "CPU"
        span = f" of {self.limits[0]} to {self.limits[1]}" if self.limits else ""
        return f"{self.count} {kind} worker{'s' if self.count != 1 else ''}{span} ({self.why})"

    @property
    def resources(self) -> str:
        """What the cluster must have free for all of them."""
        return f"{self.count} GPU{'s' if self.count != 1 else ''}" if self.use_gpu else f"{self.count} CPU workers"

    def at_most(self, workers: int) -> Placement:
        """No more than that, where the recipe leaves a choice: a lane of the order is never cut."""
        if self.limits is None or self.limits[1] <= workers:
            return self
        fewest = min(self.limits[0], workers)
        return replace(self, count=min(self.count, workers), limits=(fewest, workers))

    def resized(self, room: int) -> Placement:
        """For as many workers as there is room for, within the limits; the caller waits for the fewest."""
        if self.limits is None:
            return self
        return replace(self, count=max(self.limits[0], min(self.limits[1], room)))


@dataclass(frozen=True, slots=True)
class Node:
    """A living node of the cluster."""

    id: str
    resources: Mapping[str, float]  # All that it has, used or not.
    leaves: bool = False  # Draining: it starts nothing more and will be taken away.


def count_room(
    nodes: Iterable[Node], available: Mapping[str, float] | None, need: Mapping[str, float], running: int = 0
) -> int:
    """Workers for whom there is room: on whole nodes, and in what is free of the cluster beside `running` of ours.

    Of GPU workers only their GPUs must be free: CPUs are held for moments by the reading. None: nobody else is here.
    """
    wanted = {name: amount for name, amount in need.items() if amount > 0}
    if not wanted:
        raise ValueError("a worker that needs nothing fits any number of times")

    def times(has: Mapping[str, float], names: Iterable[str]) -> int:
        return int(min(has.get(name, 0.0) / wanted[name] + 1e-6 for name in names))

    whole = sum(times(node.resources, wanted) for node in nodes if not node.leaves)
    if available is None:
        return whole
    return min(whole, running + times(available, {"GPU"} & wanted.keys() or wanted))


class MakingWay:
    """Whether the workers should store a checkpoint and end, to start again elsewhere or in another number."""

    def __init__(self, placement: Placement, resize_seconds: float, taken: int = 0) -> None:
        """`taken`: room for so many was seen before, and others turned out to hold it."""
        self._placement, self._resize_seconds, self._taken = placement, resize_seconds, taken
        self._began: float | None = None
        self._roomy_since: float | None = None

    def reason(self, nodes: Collection[Node], ours: Collection[str], room: int, now: float) -> str | None:
        """For the user. `ours`: beginnings of the ids of the nodes that we work on; empty before the first step."""
        if not ours:
            return None
        self._began = now if self._began is None else self._began
        leaving = [node.id for node in nodes if node.leaves and node.id.startswith(tuple(ours))]
        if leaving:
            return f"node {leaving[0][:12]} is about to be taken away"
        more = self._placement.limits is not None and min(room, self._placement.limits[1]) > self._placement.count
        if not more or room <= self._taken:
            self._roomy_since = None
            return None
        self._roomy_since = now if self._roomy_since is None else self._roomy_since
        if now - self._roomy_since < STEADY_SECONDS or now - self._began < self._resize_seconds:
            return None
        return f"there is room for {self._placement.resized(room).count} workers instead of {self._placement.count}"


def place(workers: WorkerConfig, cpus: float, gpus: float, *, can_grow: bool, room: int | None = None) -> Placement:
    """From the recipe and what the cluster shows. `can_grow`: nodes may still come, as on an autoscaling cluster.

    `room`: CPU workers that fit on its nodes; None takes `cpus` as one node.
    ValueError: the recipe asks for what this cluster does not have and will not get.
    """
    shown = int(gpus)
    if isinstance(workers.count, tuple):
        on_gpus = workers.device == "cuda" or (workers.device == "auto" and shown > 0)
        fits = shown if on_gpus else room if room is not None else int(cpus / workers.cpus + 1e-6)
        return _between(workers, workers.count, fits, on_gpus, can_grow)
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


def _between(workers: WorkerConfig, limits: tuple[int, int], fits: int, on_gpus: bool, can_grow: bool) -> Placement:
    fewest, most = limits
    kind = "GPU" if on_gpus else "CPU"
    if fits < fewest and not can_grow:
        raise ValueError(
            f"workers.count={list(limits)}: this machine has room for {fits} {kind} workers"
            f"{'' if on_gpus else f' of {workers.cpus:g} CPUs'}; nearest: {[max(1, fits), most]}"
        )
    count = max(fewest, min(most, fits))
    return Placement(count, on_gpus, f"the cluster has room for {fits}", waits=fits < fewest, limits=limits)


def _on_gpus(count: int | None, shown: int, can_grow: bool) -> Placement:
    if shown >= (count or 1):
        return Placement(count or shown, True, f"the cluster shows {_gpus(shown)}")
    if not can_grow:
        raise ValueError(
            f"workers.device=cuda{f', workers.count={count}' if count else ''}: Ray shows {_gpus(shown)} on this "
            "machine; take workers.device: auto or cpu here, or point RAY_ADDRESS at a cluster with GPUs"
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
