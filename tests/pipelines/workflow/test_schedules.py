"""A schedule fires by the clock, registers a version once, also after a reboot, and says truly whether it can fire."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import dagster
import psutil
import pytest

from infra.endpoints import Endpoints
from pipelines import identity, store
from pipelines.config import RecipeError
from pipelines.processes import start_mark
from pipelines.workflow import schedules
from pipelines.workflow.home import dagster_home
from pipelines.workflow.spec import load_workflow

FLOW = """
name: by_the_clock
schedule: "* * * * *"
steps:
  shard:
    stage: shard
    recipe: smoke/shard
    set: {{source: {photos}, destination: {name}, splits: {{train: 0.7, val: 0.1, test: 0.2}}}}
  finetune:
    stage: finetune
    recipe: smoke/finetune
    inputs: {{corpus: shard}}
    set:
      register_as: {name}
      resolution: 16
      train.total_steps: 4
      model: {{patch_size: 4, width: 32, depth: 1, mlp_dim: 64, num_heads: 2}}
"""


@pytest.fixture
def no_daemon_left() -> Iterator[None]:
    yield
    schedules.stop()


def listening(process: psutil.Process) -> list[str]:
    family = [process, *process.children(recursive=True)]
    return [
        f"{each.name()} on {connection.laddr.ip}:{connection.laddr.port}"
        for each in family
        for connection in each.net_connections(kind="inet")
        # Loopback has a second spelling where a socket takes both families.
        if connection.status == psutil.CONN_LISTEN
        and not connection.laddr.ip.removeprefix("::ffff:").startswith("127.")
    ]


def leases() -> set[str]:
    """Of finetune runs that have begun."""
    found = store.list_objects(store.join(identity.runs(), "finetune"))
    return {info.uri for info in found if info.uri.endswith("/lease.json")}


def finished(instance: dagster.DagsterInstance, count: int, home: Path, seconds: float = 400) -> list[str]:
    """Status of the runs, oldest first, once so many have ended."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        runs = instance.get_runs(dagster.RunsFilter(job_name="by_the_clock_job"))[::-1]
        if sum(run.is_finished for run in runs) >= count:
            return [run.status.value for run in runs]
        time.sleep(1)
    raise AssertionError((home / "daemon.log").read_text()[-3000:])


@pytest.mark.stack
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("no_daemon_left")
def test_a_finetune_fires_by_the_clock_and_registers_one_version_also_after_a_reboot(
    stack: Endpoints, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    before = leases()
    name = f"clock-{tmp_path.name[-8:].strip('0_') or 'x'}-{int(time.time())}"
    path = tmp_path / "flow.yaml"
    path.write_text(FLOW.format(photos=photos, name=name))
    schedules.start(load_workflow(path), path)
    home = dagster_home()
    pid = schedules.daemon_pid(home)
    assert pid is not None
    with dagster.DagsterInstance.from_config(str(home)) as instance:
        deadline = time.monotonic() + 200
        while leases() == before:
            assert time.monotonic() < deadline, (home / "daemon.log").read_text()[-3000:]
            time.sleep(0.2)
        assert not listening(psutil.Process(pid))
        # As a reboot leaves it: the scheduler, its code server and the run are gone, and nobody has said so.
        killed = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
        for process in killed:
            process.kill()
        # A process of many threads is not gone the moment it is killed, and an orphan may stay a zombie for ever.
        deadline = time.monotonic() + 30
        while any(start_mark(process.pid) for process in killed):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert schedules.daemon_pid(home) is None
        schedules.start(load_workflow(path), path)
        assert finished(instance, 2, home) == ["FAILURE", "SUCCESS"]
    assert len(MlflowClient().search_model_versions(f"name = '{name}'")) == 1
    assert schedules.status() == 0
    assert "success" in capsys.readouterr().out


def test_a_run_has_time_to_store_its_checkpoint_before_it_is_killed() -> None:
    from pipelines.training import watch

    assert schedules.STOP_SECONDS >= watch.STOP_SECONDS + 45


@pytest.mark.usefixtures("house")
def test_a_workflow_without_a_schedule_says_how_to_write_one(house: Path) -> None:
    (house / "r.yaml").write_text("leaf: mint\n")
    (house / "w.yaml").write_text("steps: {a: {stage: brew, recipe: r.yaml}}")
    with pytest.raises(RecipeError, match="has no `schedule:`; every night at three"):
        schedules.main(["start", str(house / "w.yaml")])


@pytest.mark.usefixtures("house", "no_daemon_left")
def test_a_daemon_that_cannot_load_the_workflow_is_not_called_healthy(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code server is another process; the stage that only these tests know is unknown there."""
    (house / "r.yaml").write_text("leaf: mint\n")
    path = house / "w.yaml"
    path.write_text('schedule: "* * * * *"\nsteps: {a: {stage: brew, recipe: r.yaml}}')
    with pytest.raises(RuntimeError, match=r"could not be loaded: .*\n?.*unknown stage 'brew'"):
        schedules.start(load_workflow(path), path)
    assert schedules.status("w") == 1
    assert "could not be loaded" in capsys.readouterr().out
    pid = schedules.daemon_pid(dagster_home())
    assert pid is not None
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    schedules.stop("w")
    assert not [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert schedules.status() == 0
    assert "nothing is scheduled" in capsys.readouterr().out
