"""The Ray head of the embedded stack: all of it on loopback, behind a token, jobs included."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

from infra.endpoints import PART_MARK, clean_for_loopback
from infra.local.launch import http_status, rotate, search_path
from infra.local.part import Launch, Started
from infra.local.processes import Process, identify, members

__all__ = ["RayHead"]

OBJECT_STORE_BYTES = 1_000_000_000
# Flag of `ray start` for each port.
FLAGS = {
    "gcs": "port",
    "object_manager": "object-manager-port",
    "node_manager": "node-manager-port",
    "dashboard": "dashboard-port",
    "agent": "dashboard-agent-listen-port",
    "agent_grpc": "dashboard-agent-grpc-port",
    "runtime_env": "runtime-env-agent-port",
    "metrics": "metrics-export-port",
}
# Without any of these no job can be submitted or run. The log monitor and the autoscaler monitor are no such.
ESSENTIAL = {
    "gcs_server": "gcs_server",
    "raylet": "raylet",
    "dashboard.py": "dashboard",
    "ray::DashboardAgent": "dashboard agent",
    "ray::RuntimeEnvAgent": "runtime environment agent",
}


class RayHead:
    name: ClassVar[str] = "ray"
    title: ClassVar[str] = "Ray head"
    asks: ClassVar[tuple[str, ...]] = ("store", "mlflow")  # Jobs and workers inherit their addresses from the head.
    ports: ClassVar[tuple[str, ...]] = (*FLAGS, "dashboard_metrics", "autoscaler_metrics")

    def start(self, launch: Launch) -> Started:
        state, log = launch.state, launch.state.logs / "ray.log"
        folder = state.ray_folder()
        _forget_old_sessions(folder)
        environment = _environment(launch)
        command = [sys.executable, "-P", str(Path(__file__).with_name("ray_head.py")), "start", "--head"]
        command += ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
        command += [f"--{FLAGS[name]}={port}" for name, port in launch.ports.items() if name in FLAGS]
        # Two training workers and the reader beside them are the least that a pipeline asks for.
        command += [f"--num-cpus={max(2, os.cpu_count() or 1)}", f"--object-store-memory={OBJECT_STORE_BYTES}"]
        command += [f"--temp-dir={folder}"]
        rotate(log)
        with log.open("ab") as output:
            starter = subprocess.Popen(
                command,
                cwd=state.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                umask=0o077,
            )
        try:
            launch.watch.until(self.title, log, lambda: starter.poll() == 0, lambda: starter.returncode in (None, 0))
        finally:
            if starter.poll() is None:
                starter.kill()
                starter.wait()
        mark, sessions = environment[PART_MARK], (starter.pid,)
        found: dict[str, Process] = {}

        def essentials() -> bool:
            found.update(_essential(members(mark, (), sessions)))
            return len(found) == len(ESSENTIAL)

        headers = {"Authorization": f"Bearer {state.token_path.read_text().strip()}"}
        jobs = f"{launch.endpoints.ray_jobs}/api/jobs/"
        alive = lambda: all(process.is_alive() for process in found.values())  # noqa: E731
        launch.watch.until(self.title, log, essentials, alive)
        launch.watch.until(self.title, log, lambda: http_status(jobs, headers) == 200, alive)
        link = state.logs / "ray"
        link.unlink(missing_ok=True)
        link.symlink_to(folder / "session_latest" / "logs")
        return Started(tuple(found.values()), sessions)

    def turn(self, process: Process) -> int:
        # The raylet takes its workers and agents along; without the GCS the others would wait for it to come back.
        return {"raylet": 0, "gcs_server": 2}.get(process.name, 1)

    def tidy(self, ports: dict[str, int]) -> None:
        pass


def _environment(launch: Launch) -> dict[str, str]:
    environment = launch.state.child_environment(RayHead.name)
    clean_for_loopback(environment)
    environment |= launch.endpoints.environment()
    environment.pop("RAY_ADDRESS")  # For clients: `ray start --head` would take it for a cluster to join.
    environment |= {
        "PATH": search_path(Path(sys.executable).parent),
        "RAY_USAGE_STATS_ENABLED": "0",
        "DASHBOARD_METRIC_PORT": str(launch.ports["dashboard_metrics"]),
        "AUTOSCALER_METRIC_PORT": str(launch.ports["autoscaler_metrics"]),
        # Idle workers cost 60 MB each; the first task starts one in a second.
        "RAY_prestart_worker_first_driver": "0",
        "RAY_enable_worker_prestart": "0",
        # Training pauses its readers for seconds at a time; Ray would end them after one, and each new one costs three
        # seconds of CPU in imports. What a finished job leaves is ended at once all the same.
        "RAY_idle_worker_killing_time_threshold_ms": "60000",
        # One machine: there is no node whose loss could be foreseen, and the watcher is a process of its own.
        "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
        # A dead dataset's claim on the cluster would block the next one for 180 s.
        "RAY_DATA_AUTOSCALING_REQUEST_EXPIRE_TIME_S": "30",
        "RAY_ROTATION_MAX_BYTES": str(16 << 20),
        "RAY_ROTATION_BACKUP_COUNT": "1",
    }
    return environment


def _essential(living: list[Process]) -> dict[str, Process]:
    import psutil

    found: dict[str, Process] = {}
    for process in living:
        try:
            words = psutil.Process(process.pid).cmdline()[:3]
        except (psutil.Error, OSError):
            continue
        names = {Path(word).name for word in words if word}
        for word, name in ESSENTIAL.items():
            # Forked workers of the dashboard carry its name in their title, after a bracket.
            if word in names and (named := identify(process.pid, name)):
                found[name] = named
    return found


def _forget_old_sessions(folder: Path, keep: int = 2) -> None:
    """Logs and sockets of former heads; the newest stay for a look."""
    sessions = sorted(path for path in folder.glob("session_2*") if path.is_dir() and not path.is_symlink())
    for path in sessions[: max(0, len(sessions) - keep)]:
        shutil.rmtree(path, ignore_errors=True)
