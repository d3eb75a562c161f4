"""What a window of steps cost: images/s, waiting for data, share of the device's peak, compute on the paper's axis."""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from pipelines.training.parallel import Ranks
from pipelines.training.step import Counts

__all__ = ["Window", "exaflops", "peak_flops"]

# Dense bf16 FLOP/s from the vendors' data sheets; the first name found in the device's name counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "GH200": 989e12,
    "A100": 312e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak of a known GPU; None on a CPU, whose peak no data sheet states for one process."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


def exaflops(macs_per_image: int, images: int) -> float:
    """Training compute: 2 FLOPs a MAC, forward and twice that backward (reproduces the paper's Table 6 within 1 %)."""
    return 6.0 * macs_per_image * images / 1e18


class Window:
    """Sums between two points of the curves. Only `close` waits for the device and for the other ranks."""

    def __init__(self, ranks: Ranks, batch_size: int, macs_per_image: int = 0) -> None:
        self.ranks, self.batch_size, self.macs_per_image = ranks, batch_size, macs_per_image
        self.peak = peak_flops(ranks.device)
        self._open()

    def _open(self) -> None:
        self._sums: Tensor | None = None
        self._norm: Tensor | None = None
        self._steps = 0
        self._data_wait = 0.0
        self._excluded = 0.0
        self._started = time.perf_counter()

    def add(self, counts: Counts) -> None:
        sums = counts.stacked()
        self._sums = sums if self._sums is None else self._sums.add_(sums)
        self._norm = counts.grad_norm
        self._steps += 1

    def waited(self, seconds: float) -> None:
        """Time between asking for a batch and having it."""
        self._data_wait += seconds

    def exclude(self, seconds: float) -> None:
        """Time that is not training: validation, the pause of a checkpoint."""
        self._excluded += seconds

    def close(self, step: int, total_steps: int, lr: float, stop: int) -> tuple[dict[str, float], int]:
        """Metrics of the window and the sum over ranks of `stop`. Collective: every rank, at the same step."""
        assert self._sums is not None and self._norm is not None
        vector = torch.cat([self._sums, torch.tensor([float(stop)], dtype=torch.float64, device=self._sums.device)])
        loss, correct, images, stops = self.ranks.sum(vector).tolist()
        seconds = max(time.perf_counter() - self._started - self._excluded, 1e-9)
        rate = self._steps * self.batch_size / seconds
        metrics = {
            "train/loss": loss / images if images else math.nan,
            "train/top1": correct / images if images else math.nan,
            "lr": lr,
            "grad_norm": float(self._norm),
            "images_per_second": rate,
            "time/step": seconds / self._steps,
            "time/data_wait": self._data_wait / self._steps,
            "images_seen": float(step * self.batch_size),
            "eta_seconds": (total_steps - step) * seconds / self._steps,
        }
        if bad := self._steps * self.batch_size - images:
            metrics["train/bad_samples"] = bad
        if self.macs_per_image:
            metrics["exaflops"] = exaflops(self.macs_per_image, step * self.batch_size)
            if self.peak is not None:
                metrics["mfu"] = 6.0 * self.macs_per_image * rate / (self.peak * self.ranks.world_size)
        self._open()
        return metrics, int(stops)
