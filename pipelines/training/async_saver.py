"""Checkpoints are stored beside training: the loop pauses for the copy of the tensors alone."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from pipelines.training.checkpoint import Checkpoints, Found

__all__ = ["AsyncSaver"]

NICE = 10  # Added for the thread that uploads: a tenth of a core that training wants too.


class AsyncSaver:
    """Uploads in a thread, one at a time; the loop pauses only for the copy of the tensors."""

    def __init__(self, checkpoints: Checkpoints, committed: Callable[[Found], None] = lambda _: None) -> None:
        self._checkpoints, self._committed = checkpoints, committed
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        rows: Mapping[str, int] | None = None,
        token: str = "",
    ) -> None:
        """Start the upload of these CPU tensors, after the one under way. Raises what the one before ended with."""
        self.wait()
        arguments = (step, tensors, state, rows, token)
        self._thread = threading.Thread(target=self._run, args=arguments, name=f"checkpoint {step}")
        self._thread.start()

    def _run(self, *arguments: Any) -> None:
        _yield_to_training()
        try:
            if (found := self._checkpoints.save(*arguments)) is not None:
                self._committed(found)
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Until the upload under way has ended. Raises its error once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def poll(self) -> None:
        """Raise the error of the last upload, if it had one."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error


def _yield_to_training() -> None:
    """Where cores are short, this thread takes what training leaves of them. Only Linux can say so of a thread."""
    if sys.platform == "linux":
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + NICE))
