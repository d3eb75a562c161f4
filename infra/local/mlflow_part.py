"""The MLflow server of the embedded stack: SQLite in the state folder, artifacts through the server into the store."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from infra.endpoints import clean_for_loopback
from infra.local.launch import detach, http_status
from infra.local.part import Launch, Started
from infra.local.processes import Process

__all__ = ["MlflowServer"]


class MlflowServer:
    name: ClassVar[str] = "mlflow"
    title: ClassVar[str] = "MLflow server"
    asks: ClassVar[tuple[str, ...]] = ("store",)
    ports: ClassVar[tuple[str, ...]] = ("http",)

    def start(self, launch: Launch) -> Started:
        folder = launch.state.folder / "mlflow"
        folder.mkdir(exist_ok=True, mode=0o700)
        port = launch.ports["http"]
        log = launch.state.logs / "mlflow.log"
        environment = launch.state.child_environment(self.name)
        clean_for_loopback(environment)
        given = launch.endpoints.environment()
        environment |= {name: given[name] for name in given if not name.startswith(("RAY_", "VIT_", "MLFLOW_TRACKING"))}
        environment |= {
            "MLFLOW_S3_ENDPOINT_URL": given["AWS_ENDPOINT_URL"],
            # Off: ten processes and 2 GB for jobs that nobody submits here.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_SERVER_ALLOWED_HOSTS": f"127.0.0.1:{port},localhost:{port}",
            "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": f"http://127.0.0.1:{port},http://localhost:{port}",
        }
        script = Path(__file__).with_name("mlflow_server.py")
        arguments = [str(folder / "mlflow.db"), f"{launch.endpoints.root}/mlflow", str(port), str(log)]
        # -P keeps this folder off the module path.
        process, session = detach([sys.executable, "-P", str(script), *arguments], environment, folder, log)
        health = f"{launch.endpoints.mlflow}/health"
        launch.watch.until(self.title, log, lambda: http_status(health) == 200, process.is_alive)
        return Started((process,), (session,))

    def turn(self, process: Process) -> int:
        return 0

    def tidy(self, ports: dict[str, int]) -> None:
        pass
