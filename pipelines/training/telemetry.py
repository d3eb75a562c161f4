"""What a window of steps cost: images/s, waiting for data, share of the device's peak, compute on the paper's axis."""

from __future__ import annotations

import math
import resource
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.training.parallel import Ranks
from pipelines.training.step import Counts

__all__ = ["Closed", "Window", "exaflops"]


def exaflops(macs_per_image: int, images: int) -> float:
    """Training compute: 2 FLOPs a MAC, forward and twice that backward (reproduces the paper's Table 6 within 1 %)."""
    return 6.0 * macs_per_image * images / 1e18


@dataclass(frozen=True, slots=True)
class Closed:
    """A window as all ranks see it."""

    metrics: dict[str, float]
    stop: bool  # Some rank wants to stop.
    save: bool  # Some rank wants a checkpoint.
    bad_step: int | None  # First update of the window whose loss or gradient is not finite, counted from 0.


class Window:
    """Sums between two points of the curves. Only `close` waits for the device and for the other ranks."""

    def __init__(self, ranks: Ranks, batch_size: int, macs_per_image: int = 0, peak_flops: float | None = None) -> None:
        """`peak_flops`: FLOP/s of one device by its data sheet; without it there is no mfu."""
        self.ranks, self.batch_size, self.macs_per_image = ranks, batch_size, macs_per_image
        self.peak = peak_flops
        self._open()

    def _open(self) -> None:
        self._each: list[Tensor] = []  # (3,) of each step: loss, right answers, images of this rank.
        self._norms: list[Tensor] = []
        self._data_wait = 0.0
        self._excluded = 0.0
        self._started = time.perf_counter()

    def add(self, counts: Counts, left_out: bool = False) -> None:
        """`left_out`: a step without an update; its images count as bad samples, its loss and gradient not at all."""
        assert counts.grad_norm is not None
        each = counts.stacked()
        self._each.append(torch.zeros_like(each) if left_out else each)
        self._norms.append(torch.zeros_like(counts.grad_norm) if left_out else counts.grad_norm)

    def waited(self, seconds: float) -> None:
        """Time between asking for a batch and having it."""
        self._data_wait += seconds

    def exclude(self, seconds: float) -> None:
        """Time that is not training: validation, the pause of a checkpoint."""
        self._excluded += seconds

    def close(self, step: int, total_steps: int, lr: float, stop: bool = False, save: bool = False) -> Closed:
        """Collective: every rank, at the same step. `step`: updates done; `stop`, `save`: what this rank wants."""
        wishes = torch.tensor([float(stop), float(save)], dtype=torch.float64, device=self._each[0].device)
        summed = self.ranks.sum(torch.cat([torch.stack(self._each).flatten(), wishes]))
        sums, steps = summed[:-2].view(-1, 3), len(self._each)
        finite = (
            sums[:, 0].isfinite() & torch.stack(self._norms).isfinite()
        ).tolist()  # Here the device is waited for.
        seconds = max(time.perf_counter() - self._started - self._excluded, 1e-9)
        (loss, correct, images), (stops, saves) = sums.sum(dim=0).tolist(), summed[-2:].tolist()
        rate = steps * self.batch_size / seconds
        metrics = {
            "train/loss": loss / images if images else math.nan,
            "train/top1": correct / images if images else math.nan,
            "lr": lr,
            "grad_norm": float(self._norms[-1]),
            "images_per_second": rate,
            "time/step": seconds / steps,
            "time/data_wait": self._data_wait / steps,
            "images_seen": float(step * self.batch_size),
            "eta_seconds": (total_steps - step) * seconds / steps,
        }
        if bad := steps * self.batch_size - images:
            metrics["train/bad_samples"] = bad
        metrics["memory/peak_gib"] = self._peak_memory() / 2**30
        if self.macs_per_image:
            metrics["exaflops"] = exaflops(self.macs_per_image, step * self.batch_size)
            if self.peak is not None:
                metrics["mfu"] = 6.0 * self.macs_per_image * rate / (self.peak * self.ranks.world_size)
        self._open()
        return Closed(metrics, stops > 0, saves > 0, None if all(finite) else step - steps + finite.index(False))

    def _peak_memory(self) -> int:
        """Bytes of rank 0 so far: of its GPU's tensors, or of its whole process on a CPU."""
        if self.ranks.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.ranks.device)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
