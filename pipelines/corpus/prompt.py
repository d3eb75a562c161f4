"""Every CPU from the first moment on: what Ray Data does not do by itself."""

from __future__ import annotations

from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

__all__ = ["Prompt"]

ASK_SECONDS = 0.02


class Prompt(ExecutionCallback):  # type: ignore[misc,unused-ignore]
    """Ask anew for the CPUs of the cluster until they are known.

    Ray Data asks another actor for them without waiting for the answer, and looks at it a second later. Until then its
    limit is nothing, so a single task runs. Where a later Ray has no such limit, nothing is done.
    """

    def before_execution_starts(self, executor: Any) -> None:
        self._limits: Any = getattr(executor, "_resource_manager", None)
        if self._limits is not None and hasattr(self._limits, "GLOBAL_LIMITS_UPDATE_INTERVAL_S"):
            self._limits.GLOBAL_LIMITS_UPDATE_INTERVAL_S = ASK_SECONDS

    def on_execution_step(self, executor: Any) -> None:
        if self._limits is not None and self._limits.get_global_limits().cpu > 0:
            vars(self._limits).pop("GLOBAL_LIMITS_UPDATE_INTERVAL_S", None)
            self._limits = None
