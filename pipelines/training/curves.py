"""Points of the curves that the tracking server does not have yet: a resumed run logs none twice."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Curves", "FreshPoints"]


class Curves(Protocol):
    """What is needed of a tracking run (pipelines.tracking.run.Run)."""

    def last_steps(self) -> dict[str, int]: ...
    def log_metrics(self, values: dict[str, float], step: int) -> None: ...
    def flush(self) -> bool: ...


class FreshPoints:
    """Hands on what is after the last step that the tracking server has of each curve."""

    def __init__(self, run: Curves) -> None:
        self._run = run
        self._last: dict[str, int] | None = None  # Last step of each key that MLflow has or will be sent.

    def __call__(self, values: dict[str, float], step: int) -> None:
        if self._last is None:
            self._last = self._run.last_steps()  # Once: from here on nobody else writes this run.
        last = self._last
        fresh = {key: value for key, value in values.items() if step > last.get(key, -1)}
        if fresh:
            self._run.log_metrics(fresh, step)
            last.update(dict.fromkeys(fresh, step))

    def flush(self) -> bool:
        return self._run.flush()
