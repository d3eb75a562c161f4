"""Where the object store, MLflow and Ray are. The environment says it, or the state folder of the embedded stack.

`ensure()` is the one door for stages and commands: it takes a given environment as it is, checks the embedded stack,
restarts what died, and puts the endpoints into this process' environment.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["BUCKET", "Endpoints", "current", "ensure", "lack_of_space"]

log = logging.getLogger(__name__)

BUCKET = "vit"  # The one bucket of the embedded store, and all that its working key can reach.
LEAST_FREE_BYTES = 1 << 30  # Of the disk under the state folder: below it no stack is started.
PART_MARK = "VIT_PART"  # Carried by every process of an embedded stack, and so by each Ray worker and job of it.
# Of another account, a named profile or another server; beside our own key pair they make every request fail.
FOREIGN = (
    "AWS_SESSION_TOKEN",
    "AWS_SECURITY_TOKEN",
    "AWS_PROFILE",
    "AWS_DEFAULT_PROFILE",
    "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Addresses and keys. A field is None where the environment leaves it to the library's own default."""

    root: str  # Where corpora and runs live, such as "s3://vit".
    s3_endpoint: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    region: str | None = None
    mlflow: str | None = None
    ray: str | None = None  # host:port of the GCS.
    ray_jobs: str | None = None  # http address of the dashboard.
    ray_token_path: str | None = None
    state: Path | None = None  # State folder of the embedded stack; None: somebody else runs the services.

    def environment(self) -> dict[str, str]:
        """What a process needs to reach these endpoints. It holds the secret key: never log it."""
        named = {
            "VIT_ROOT": self.root,
            "AWS_ENDPOINT_URL": self.s3_endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": self.region,
            "MLFLOW_TRACKING_URI": self.mlflow,
            "RAY_ADDRESS": self.ray,
            "RAY_API_SERVER_ADDRESS": self.ray_jobs,  # What `ray job submit` reads.
            "VIT_RAY_JOBS": self.ray_jobs,
            "RAY_AUTH_TOKEN_PATH": self.ray_token_path,
            "RAY_AUTH_MODE": "token" if self.ray_token_path else None,
            "VIT_STATE": str(self.state) if self.state else None,
        }
        if self.state:
            # Else Ray rewrites 127.0.0.1 to the machine's own address and listens on every interface.
            named["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            named["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = (
                "5"  # MLflow's 7 mean minutes of silence when the server is gone.
            )
        named |= {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
        named |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false"}
        return {name: value for name, value in named.items() if value}

    def apply(self) -> None:
        """Put the endpoints into this process' environment; children inherit them."""
        if self.state:
            clean_for_loopback(os.environ)
        os.environ.update(self.environment())
        if self.state and "ray" in sys.modules:
            _tell_imported_ray()


def clean_for_loopback(environment: dict[str, str] | os._Environ[str]) -> None:
    """Nothing between us and 127.0.0.1: no proxy, no credentials of another account."""
    for name in FOREIGN:
        environment.pop(name, None)
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in environment.get(name, "").split(",") if host]
        environment[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))


def _tell_imported_ray() -> None:
    """Ray reads its variables once, when it is imported; a notebook may have done that before it asked for a stage."""
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined,unused-ignore]

    ray_constants.ENABLE_RAY_CLUSTER = False
    Config.initialize("")


def _from_environment() -> Endpoints:
    value = os.environ.get
    state = value("VIT_STATE")
    return Endpoints(
        root=os.environ["VIT_ROOT"],
        s3_endpoint=value("AWS_ENDPOINT_URL"),
        access_key=value("AWS_ACCESS_KEY_ID"),
        secret_key=value("AWS_SECRET_ACCESS_KEY"),
        region=value("AWS_DEFAULT_REGION"),
        mlflow=value("MLFLOW_TRACKING_URI"),
        ray=value("RAY_ADDRESS"),
        ray_jobs=value("VIT_RAY_JOBS"),
        ray_token_path=value("RAY_AUTH_TOKEN_PATH"),
        state=Path(state) if state else None,
    )


def _is_given() -> bool:
    """Is the environment to be taken as it is? Not if it is a copy of the embedded stack's own, which may be old."""
    if "VIT_ROOT" not in os.environ:
        return False
    if PART_MARK in os.environ or "VIT_STATE" not in os.environ:
        return True
    from infra.local.state import State

    state = State.find()
    keys = state.keys() if state else None
    return keys is None or keys.access_key != os.environ.get("AWS_ACCESS_KEY_ID")


def _with_own_root(found: Endpoints) -> Endpoints:
    """A VIT_ROOT beside a copy of the stack's own environment is the user's choice, such as a prefix of the bucket."""
    return replace(found, root=os.environ.get("VIT_ROOT") or found.root)


def _say_unused(say: Callable[[str], None]) -> None:
    """A server that the environment names and the embedded stack replaces must not be left out in silence."""
    for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "RAY_ADDRESS"):
        given = os.environ.get(name, "")
        host = urlsplit(given if "://" in given else f"//{given}").hostname
        # Loopback: of a stack of ours, maybe one that moved.
        if given and host not in {"auto", "local", "localhost", "127.0.0.1"}:
            say(f"{name}={given} is not used: without VIT_ROOT the embedded stack serves; set VIT_ROOT to use your own")


def current() -> Endpoints | None:
    """The endpoints in force, without checking or starting anything; None if there are none."""
    if _is_given():
        return _from_environment()
    from infra.local.state import State

    state = State.find()
    found = state.endpoints() if state else None
    return _with_own_root(found) if found else None


def lack_of_space() -> str | None:
    """A sentence if the disk under the embedded store is nearly full: then it refuses to write, and says only 500."""
    folder = os.environ.get("VIT_STATE")
    try:
        disk = shutil.disk_usage(folder) if folder else None
    except OSError:
        return None
    if disk is None or disk.free > max(LEAST_FREE_BYTES, disk.total // 50):  # It stops at one hundredth.
        return None
    return (
        f"{disk.free >> 20:,} MB of {disk.total >> 20:,} are free on the disk of {folder}; when it is full the object "
        "store refuses writes: free some there"
    )


def ensure(start: bool = True, say: Callable[[str], None] | None = None) -> Endpoints:
    """The endpoints in force, alive and put into `os.environ`.

    A given environment (VIT_ROOT) is taken as it is: processes on a cluster never start anything. Else, or beside a
    copy of the stack's own environment (`vit env`; its VIT_ROOT may be another), every part of the embedded stack is
    checked, a dead part is restarted and `say` hears a sentence about it (default: a logged warning). Without a stack
    one is started; with `start=False` that is a StackError.
    """
    if _is_given():
        return _from_environment()
    from infra.local.stack import attend
    from infra.local.state import State

    say = say or (lambda text: log.warning("%s", text))
    _say_unused(say)
    endpoints = _with_own_root(attend(State.find() or State.default(), start=start, say=say))
    endpoints.apply()
    if lack := lack_of_space():
        say(lack)
    return endpoints
