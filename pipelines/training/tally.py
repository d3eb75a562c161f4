"""What a run has come to so far: images, seconds, dollars, and the newest value of every curve."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pipelines.training.nodes import NodeLoad
from pipelines.training.parallel import Ranks
from pipelines.training.reporter import Reporter

__all__ = ["Tally"]

NOT_KEPT = ("eta_seconds", "lr")  # Of no meaning once the run is over; nor are the loads of nodes.


class Tally:
    """Adds windows up on every rank, and has rank 0 report them."""

    def __init__(
        self,
        ranks: Ranks,
        batch_size: int,
        reporter: Reporter | None,
        *,
        bad_samples: Callable[[], Mapping[str, int]] | None = None,
        nodes: NodeLoad | None = None,
        dollars_per_hour: float | None = None,
    ) -> None:
        """`dollars_per_hour`: of one worker; None says nothing of cost."""
        self._ranks, self._batch_size, self._reporter = ranks, batch_size, reporter
        self._bad_samples, self._nodes, self._price = bad_samples, nodes, dollars_per_hour
        self._latest: dict[str, float] = {}
        self._step = 0
        self._images = self.seconds = 0.0
        self._dollars = 0.0  # Since the first start, as far as checkpoints tell.
        self._counted = time.monotonic()

    def join(self) -> None:
        """Once, before the first step. Collective."""
        if self._nodes is not None:
            self._nodes.join()

    def begin(self, step: int) -> None:
        """Windows are counted from here: after a resume, and after going back."""
        self._step, self._counted = step, time.monotonic()

    def window(self, step: int, metrics: dict[str, float], last: bool) -> None:
        """A window has ended at `step`. Collective."""
        steps, self._step = step - self._step, step
        self.seconds += steps * metrics["time/step"]
        self._images += steps * self._batch_size
        metrics |= self._bad_by_reason() | self._cost(metrics["eta_seconds"])
        self._latest.update(metrics)
        load = self._nodes(last) if self._nodes is not None else {}
        if self._reporter is not None:
            self._reporter.log({**metrics, **load}, step)
            self._reporter.progress(step=step, metrics=metrics)

    def _cost(self, eta_seconds: float) -> dict[str, float]:
        """Dollars by the clock, validation and checkpoints included; starts and what a crash loses are not counted."""
        if self._price is None:
            return {}
        now = time.monotonic()
        rate = self._price * self._ranks.world_size / 3600
        self._dollars += (now - self._counted) * rate
        self._counted = now
        return {"cost/dollars": self._dollars, "cost/estimated_dollars": self._dollars + eta_seconds * rate}

    def _bad_by_reason(self) -> dict[str, float]:
        """Bad samples since this start, summed over ranks. Collective."""
        if self._bad_samples is None:
            return {}
        counts = self._bad_samples()
        values = torch.tensor(list(counts.values()), dtype=torch.float64, device=self._ranks.device)
        total = self._ranks.sum(values)
        return {f"data/bad/{reason}": count for reason, count in zip(counts, total.tolist(), strict=True) if count}

    def close(self) -> None:
        if self._nodes is not None:
            self._nodes.close()

    def to_json(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"dollars": self._dollars}

    def load(self, stored: Mapping[str, Any]) -> None:
        self._dollars = float(stored.get("dollars", 0.0))

    def metrics(self, measured: Mapping[str, float]) -> dict[str, float]:
        """For the outcome; `measured`: what held-out images came to. Finite values only: JSON knows no others."""
        latest = {key: value for key, value in {**self._latest, **measured}.items() if key not in NOT_KEPT}
        if self.seconds:
            latest["images_per_second"] = self._images / self.seconds
        return {key: value for key, value in latest.items() if math.isfinite(value)}
