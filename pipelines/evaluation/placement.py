"""How many actors hold the model in `predict`, on what device, and what is left for reading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Placement", "place"]


@dataclass(frozen=True, slots=True)
class Placement:
    """Actors that hold the model, and the CPU share of one of them and of one read task."""

    count: int
    use_gpu: bool
    cpus: float  # Logical, of an actor and of a read task alike.
    waits: bool = False  # The cluster does not show all of it yet.

    def __str__(self) -> str:
        return f"{self.count} {'GPU' if self.use_gpu else 'CPU'} worker{'s' if self.count != 1 else ''}"


def place(
    device: Literal["auto", "cpu", "cuda"], num_workers: int | None, cpus: float, gpus: float, *, can_grow: bool
) -> Placement:
    """From the recipe and what the cluster shows. `can_grow`: nodes may still come, as on an autoscaling cluster.

    ValueError: too little is there, and nothing more will come or nobody said how much to wait for.
    """
    wait = can_grow and num_workers is not None
    if device == "cuda" and gpus < 1 and not wait:
        later = "; with num_workers: N they are waited for" if can_grow else ""
        raise ValueError(f"device='cuda': the cluster shows no GPU; use device: auto or cpu{later}")
    use_gpu = device == "cuda" or (device == "auto" and gpus >= 1)
    if cpus < 1 and not wait:
        later = ", or say how many to wait for, as in num_workers: 8" if can_grow else ""
        raise ValueError(
            f"the cluster shows {cpus:g} CPUs, and reading needs one; add a node{later}; num_workers: 0 predicts in "
            "this process"
        )
    count = num_workers or int(gpus if use_gpu else max(1.0, cpus // 2))
    if count == 1 and 1 <= cpus < 2:
        return Placement(1, use_gpu, 0.5)  # A single CPU is shared by the model and the reader.
    if cpus - count >= 1 and (not use_gpu or gpus >= count):
        return Placement(count, use_gpu, 1.0)
    if wait:
        return Placement(count, use_gpu, 1.0, waits=True)
    if cpus - count >= 1:
        raise ValueError(f"num_workers={count} is more than the cluster's {gpus:g} GPUs; nearest: {gpus:g}")
    raise ValueError(
        f"the cluster has {cpus:g} CPUs and num_workers={count} would hold {count}: none is left for reading; "
        "use fewer workers, or num_workers: 0 to predict in this process"
    )
