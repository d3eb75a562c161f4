"""A run whose process was killed blocks nothing: the next tick and the next command see it, end it and go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster
import pytest

from pipelines.workflow import liveness
from pipelines.workflow.assets import definitions, run_in_process
from pipelines.workflow.home import dagster_home
from pipelines.workflow.liveness import end_dead_runs, process_of, process_tag, unfinished_runs
from pipelines.workflow.spec import Workflow, load_workflow

FLOW = 'schedule: "* * * * *"\nsteps: {a: {stage: brew, recipe: r.yaml, set: {trouble: %s}}}'

RUN = """
import sys
from pipelines.workflow import stages
from tests.pipelines.workflow import brew
sys.modules["pipelines.brew"] = brew
stages.STAGES["brew"] = "water -> tea"
from pipelines.workflow.assets import run_in_process
from pipelines.workflow.spec import load_workflow
run_in_process(load_workflow(sys.argv[1]))
"""


@pytest.fixture
def instance(house: Path) -> Iterator[dagster.DagsterInstance]:
    with dagster.DagsterInstance.from_config(str(dagster_home())) as opened:
        yield opened


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("waited in vain")


def tick(workflow: Workflow, instance: dagster.DagsterInstance) -> Any:
    """What the daemon does once a minute."""
    schedule = definitions(workflow).get_schedule_def(workflow.name)
    with dagster.build_schedule_context(instance=instance) as context:
        return schedule.evaluate_tick(context)


@pytest.mark.parametrize("finder", ["tick", "command"])
def test_a_killed_run_is_seen_ended_and_followed_by_the_next(
    write: Callable[[str, str], str], house: Path, instance: dagster.DagsterInstance, finder: str
) -> None:
    write("r.yaml", f"notes: {house / 'notes'}\n")
    path = write("w.yaml", FLOW % "sleep")
    workflow = load_workflow(path)
    process = subprocess.Popen([sys.executable, "-c", RUN, path])
    try:
        wait_for((house / "notes").exists)
        run = unfinished_runs(instance, "w")[0]
        assert run.status is dagster.DagsterRunStatus.STARTED and process_of(run) == process.pid
        assert tick(workflow, instance).skip_message == f"run {run.run_id} is still going"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert instance.get_run_by_id(run.run_id).status is dagster.DagsterRunStatus.STARTED  # type: ignore[union-attr]
    if finder == "tick":
        assert len(tick(workflow, instance).run_requests) == 1
    else:
        write("w.yaml", FLOW % "''")
        assert run_in_process(load_workflow(path))["a"].result.uri.endswith("attempts/2/cup.txt")
    assert instance.get_run_by_id(run.run_id).status is dagster.DagsterRunStatus.FAILURE  # type: ignore[union-attr]
    assert not unfinished_runs(instance, "w")


def test_a_run_that_lives_elsewhere_waits_or_has_just_been_made_is_left_alone(
    instance: dagster.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = dagster.DagsterRunStatus
    mine = process_tag()[liveness.PROCESS_TAG]
    here = f'"host": {mine.split(": ")[1].split(",")[0]}'
    assert here in mine
    for number, (state, tags) in enumerate(
        [
            (status.STARTED, process_tag()),
            (status.STARTED, {liveness.PROCESS_TAG: mine.replace(here, '"host": "another"')}),
            (status.STARTING, {}),
        ]
    ):
        instance.run_storage.add_run(
            dagster.DagsterRun(f"job{number}", status=state, tags={liveness.WORKFLOW_TAG: "w", **tags})
        )
    assert end_dead_runs(instance) == []
    monkeypatch.setattr(liveness, "UNNAMED_SECONDS", 0.0)
    assert len(end_dead_runs(instance, "another")) == 0
    assert [reason.split(" run ")[0] for reason in end_dead_runs(instance, "w")] == ["no process works on"]
    assert {run.job_name for run in unfinished_runs(instance, "w")} == {"job0", "job1"}
    assert os.getpid() == process_of(next(run for run in unfinished_runs(instance) if run.job_name == "job0"))
