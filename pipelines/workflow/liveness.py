"""Runs whose process is gone: Dagster waits for them for ever, so they are ended here.

Dagster's own run monitoring does not know whether the process of a started run still lives (its default launcher has no
such check). Each run therefore carries a tag that names its process.
"""

from __future__ import annotations

import json
import os
import socket
import time
from typing import Any

from pipelines.processes import is_alive, start_mark

__all__ = ["PROCESS_TAG", "WORKFLOW_TAG", "end_dead_runs", "process_of", "process_tag", "unfinished_runs"]

WORKFLOW_TAG = "vit/workflow"
PROCESS_TAG = "vit/process"
UNNAMED_SECONDS = 300.0  # A run that no process has put its name to for so long never got one.


def process_tag() -> dict[str, str]:
    """The tag by which this process says that it works on a run."""
    pid = os.getpid()
    return {PROCESS_TAG: json.dumps({"host": socket.gethostname(), "pid": pid, "mark": start_mark(pid)})}


def process_of(run: Any) -> int | None:
    """The pid of the living process on this host that works on the run."""
    named = _named(run)
    return int(named["pid"]) if named and _lives(named) and named["host"] == socket.gethostname() else None


def unfinished_runs(instance: Any, workflow: str | None = None) -> list[Any]:
    """Of one workflow or of all, however they were started: by the clock, in the web UI, or by `vit run`."""
    import dagster

    status = dagster.DagsterRunStatus
    going = [status.QUEUED, status.NOT_STARTED, status.STARTING, status.STARTED, status.CANCELING]
    tags = {WORKFLOW_TAG: workflow} if workflow is not None else None
    return list(instance.get_runs(dagster.RunsFilter(statuses=going, tags=tags)))


def end_dead_runs(instance: Any, workflow: str | None = None) -> list[str]:
    """Marks each unfinished run as failed whose process died (kill -9, a reboot); returns what is said of each."""
    return [reason for run in unfinished_runs(instance, workflow) if (reason := _end_if_dead(instance, run))]


def _end_if_dead(instance: Any, run: Any) -> str | None:
    named = _named(run)
    if named is not None:
        if _lives(named):
            return None
        reason = f"process {named['pid']} died in the middle of run {run.run_id[:8]}"
    else:
        record = instance.get_run_record_by_id(run.run_id)
        if run.status.value == "QUEUED" or record is None:  # Waits for its turn; that has no process yet.
            return None
        if time.time() - record.update_timestamp.timestamp() < UNNAMED_SECONDS:
            return None
        reason = f"no process works on run {run.run_id[:8]}"
    instance.report_run_failed(run, f"{reason}; it counts as failed, and the next one resumes what it left")
    return reason


def _named(run: Any) -> dict[str, Any] | None:
    try:
        named = json.loads(run.tags[PROCESS_TAG])
        return dict(named) if {"host", "pid", "mark"} <= named.keys() else None
    except (KeyError, ValueError, AttributeError):
        return None


def _lives(named: dict[str, Any]) -> bool:
    """Of a process on another host nobody here can say; its run is left alone."""
    return bool(named["host"] != socket.gethostname() or is_alive(int(named["pid"]), named["mark"]))
