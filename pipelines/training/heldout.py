"""Measurements on held-out splits: of the weights, of their average, and of what is handed on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager

from torch import Tensor

from pipelines.batch import Batch
from pipelines.training.config import TrainConfig
from pipelines.training.forward import Prepare
from pipelines.training.parallel import Ranks
from pipelines.training.reporter import Reporter
from pipelines.training.selection import Selection
from pipelines.training.state import TrainState
from pipelines.training.validation import Measured, validate
from pipelines.training.watchdog import Watchdog

__all__ = ["Batches", "HeldOut"]

Batches = AbstractContextManager[Iterator[Batch]]


class HeldOut:
    """Every method is a collective. The weights are the same, to the bit, before and after."""

    def __init__(
        self,
        validation: Callable[[], Batches] | None,
        test: Callable[[], Batches] | None,
        *,
        state: TrainState,
        config: TrainConfig,
        prepare: Prepare,
        ranks: Ranks,
        num_classes: int,
        is_cut: bool,
        selection: Selection,
        watchdog: Watchdog,
        reporter: Reporter | None,
    ) -> None:
        """`is_cut`: whether a forward pass needs all ranks, because the weights are cut over them."""
        self.splits = {"val": validation, "test": test}
        self.state, self.config, self.prepare, self.ranks = state, config, prepare, ranks
        self.num_classes, self.is_cut = num_classes, is_cut
        self.selection, self.watchdog, self.reporter = selection, watchdog, reporter
        self.latest: dict[str, float] = {}
        self.measured: Measured | None = None  # The last: the test split's, where there is one.
        self.images: dict[str, int] = {}  # By split.

    def validate(self, step: int, last: bool) -> bool:
        """While training; True when patience is at its end."""
        if self.splits["val"] is None:
            return False
        state = self.state
        own = state.evaluated() if state.averages_itself else {}
        metrics = self._measure("val", "val", step, own, keep_samples=last)
        if state.ema is not None:
            metrics |= self._measure("ema", "val", step, state.ema.tensors)
        if self.selection.take(metrics, step):
            averaged = self.selection.averaged and state.ema is not None
            chosen = state.ema.tensors if averaged and state.ema is not None else state.evaluated()
            state.best = {name: tensor.to("cpu", copy=True) for name, tensor in chosen.items()}
        return self.selection.exhausted

    def conclude(self, split: str, weights: Mapping[str, Tensor]) -> None:
        """At the end, of what is handed on: what is said of a result is measured on it."""
        if self.splits[split] is not None:
            self._measure(split, split, self.state.step, weights, keep_samples=True)

    def _measure(
        self, name: str, split: str, step: int, weights: Mapping[str, Tensor], keep_samples: bool = False
    ) -> dict[str, float]:
        """`weights`: in place of those that are trained; empty: those."""
        held_out = self.splits[split]
        assert held_out is not None
        started = time.perf_counter()
        with held_out() as batches, self.state.using(weights):
            measured = validate(
                self.state.model,
                self.watchdog.over(batches),
                self.config,
                self.prepare,
                self.ranks,
                self.num_classes,
                keep_samples=keep_samples and self.ranks.rank == 0,
                in_step=self.is_cut,
            )
        metrics = measured.metrics(name)
        metrics[f"time/{name}"] = time.perf_counter() - started
        self.latest.update(metrics)
        if name == split:
            self.measured = measured
            if self.config.masked is None:  # Shares of patches have no interval of so many images.
                self.images[name] = measured.images
        if self.reporter is not None:
            self.reporter.log(metrics, step)
            self.reporter.progress(step=step, validation=metrics)
        return metrics
