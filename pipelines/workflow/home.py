"""The folder where Dagster keeps its history: in the state folder, telemetry off, made once and by one at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["IN_PROCESS_FILE", "dagster_home", "locked", "state_folder"]

# One run of a workflow at a time: two would only wait for each other's leases.
CONFIG = """\
telemetry:
  enabled: false
run_coordinator:
  module: dagster.core.run_coordinator
  class: QueuedRunCoordinator
  config:
    tag_concurrency_limits:
      - key: vit/workflow
        limit: 1
        value:
          applyLimitPerUniqueValue: true
"""
# A command's own run writes to the terminal; only the daemon's runs have their output kept in files.
IN_PROCESS = (
    CONFIG
    + """\
compute_logs:
  module: dagster.core.storage.noop_compute_log_manager
  class: NoOpComputeLogManager
"""
)
IN_PROCESS_FILE = "in_process.yaml"


def state_folder() -> Path:
    """VIT_STATE, or `.vit` here; closed to others, and never uploaded with a job's working folder."""
    folder = Path(os.environ.get("VIT_STATE") or ".vit").resolve()
    ignore = folder / ".gitignore"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not ignore.exists():
            ignore.write_text("*\n")
    except OSError as error:
        raise OSError(
            f"state folder {folder} cannot be written ({error.strerror}); set VIT_STATE to a folder that can"
        ) from error
    return folder


def dagster_home() -> Path:
    """Made on first use. Its databases are made under a lock: two first starts at once leave a broken one."""
    home = state_folder() / "dagster"
    home.mkdir(mode=0o700, exist_ok=True)
    with locked(home):
        ready = home / "ready"
        for name, text in (("dagster.yaml", CONFIG), (IN_PROCESS_FILE, IN_PROCESS)):
            if not (home / name).exists() or (home / name).read_text() != text:
                (home / name).write_text(text)
        if not ready.exists():
            from dagster import DagsterInstance

            with DagsterInstance.from_config(str(home)) as instance:
                instance.get_runs_count()
                instance.all_instigator_state()
                instance.event_log_storage.get_maximum_record_id()
            ready.touch()
    return home


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
