"""The state folder of the embedded stack: keys, ports, processes, logs and data. Mode 0700, key files 0600.

`stack.json` names ports and processes and holds no secret; `keys.json`, `ray.token` and the store's certificates are
secrets. A `.gitignore` with `*` keeps the folder out of commits and of what `ray job submit --working-dir .` uploads.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from infra.endpoints import BUCKET, PART_MARK, Endpoints
from infra.local.errors import StackError
from infra.local.processes import Process

__all__ = ["Keys", "PartRecord", "Record", "State", "write_private"]

NAME = ".vit"
VERSION = 1
LONGEST_SOCKET_FOLDER = 107 - len("/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.12345")


@dataclass(frozen=True, slots=True)
class Keys:
    """Generated once. `access_key` reaches one bucket and no other thing; the admin pair stays with the store."""

    stack_id: str
    access_key: str
    secret_key: str = field(repr=False)
    admin_access_key: str = field(repr=False)
    admin_secret_key: str = field(repr=False)

    @staticmethod
    def generate() -> Keys:
        names = [f"{name}{secrets.token_hex(8)}" for name in ("vit", "admin")]
        return Keys(secrets.token_hex(4), names[0], secrets.token_urlsafe(32), names[1], secrets.token_urlsafe(32))


@dataclass(frozen=True, slots=True)
class PartRecord:
    ports: dict[str, int]
    processes: tuple[Process, ...] = ()  # Those without which the part is dead; empty: stopped by `down`.
    sessions: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Record:
    """Content of stack.json."""

    host: str
    parts: dict[str, PartRecord]

    def with_part(self, name: str, part: PartRecord) -> Record:
        return replace(self, parts={**self.parts, name: part})

    @property
    def is_up(self) -> bool:
        return any(part.processes for part in self.parts.values())


@dataclass(frozen=True, slots=True)
class State:
    folder: Path  # Absolute.

    @staticmethod
    def default() -> State:
        """VIT_STATE, or `.vit` in the current folder."""
        return State(Path(os.environ.get("VIT_STATE") or NAME).expanduser().absolute())

    @staticmethod
    def find() -> State | None:
        """VIT_STATE, or `.vit` in the current folder or the nearest parent that has one; None without a stack."""
        if "VIT_STATE" in os.environ:
            state = State.default()
            return state if (state.folder / "keys.json").exists() else None
        try:
            start = Path.cwd()
        except FileNotFoundError:
            return None
        for parent in (start, *start.parents):
            state = State(parent / NAME)
            # A folder that others own or can write would hand our data to their servers.
            if state.is_ours() and (state.folder / "keys.json").exists():
                return state
        return None

    def is_ours(self) -> bool:
        """A folder of this user that nobody else can write."""
        try:
            info = self.folder.lstat()
        except OSError:
            return False
        return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022

    def create(self) -> None:
        """Make the folder, or check that an existing one is a state folder."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if self.folder.stat().st_uid != os.getuid():
                raise StackError(
                    f"state folder {self.folder} belongs to another user; set VIT_STATE to a folder of yours"
                )
            names = {path.name for path in self.folder.iterdir()}
            early: tuple[str, ...] = (
                ".gitignore",
                "lock",
                "logs",
                "ray.token",
                ".ray.token.",
                ".keys.json.",
            )  # Of a start under way,
            early += ("dagster", "samples", "demo.json")  # or of commands that ran against other endpoints.
            if "keys.json" not in names and any(not name.startswith(early) for name in names):
                raise StackError(f"{self.folder} is not empty and no state folder; set VIT_STATE to a new folder")
            self.folder.chmod(0o700)
            (self.folder / ".gitignore").write_text("*\n")
            self.logs.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise StackError(
                f"state folder {self.folder} cannot be written ({error.strerror}); set VIT_STATE to a folder that can"
            ) from error

    def create_keys(self) -> None:
        """Generate the keys on the first start; the caller holds the lock."""
        if not (self.folder / "keys.json").exists():
            write_private(self.token_path, secrets.token_hex(32))
            write_private(self.folder / "keys.json", json.dumps(asdict(Keys.generate()), indent=2))

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def token_path(self) -> Path:
        return self.folder / "ray.token"

    def keys(self) -> Keys | None:
        try:
            return Keys(**json.loads((self.folder / "keys.json").read_text()))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise StackError(
                f"{self.folder / 'keys.json'} is unreadable ({error}); restore it, or remove folder and data"
            ) from error

    def require_keys(self) -> Keys:
        keys = self.keys()
        if keys is None:
            raise StackError(f"no embedded stack in {self.folder}; start one with `vit up`")
        return keys

    def mark(self, part: str) -> str:
        """Value of VIT_PART in the environment of a part's processes."""
        return f"{self.require_keys().stack_id}:{part}"

    def record(self) -> Record:
        path = self.folder / "stack.json"
        try:
            raw = json.loads(path.read_text())
            parts = {
                name: PartRecord(part["ports"], tuple(Process(**p) for p in part["processes"]), tuple(part["sessions"]))
                for name, part in raw["parts"].items()
            }
            return Record(raw["host"], parts)
        except FileNotFoundError:
            return Record(socket.gethostname(), {})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StackError(
                f"{path} is unreadable ({error}); remove it: the next `vit up` finds what still runs by its mark"
            ) from error

    def save(self, record: Record) -> None:
        write_private(self.folder / "stack.json", json.dumps({"version": VERSION, **asdict(record)}, indent=2))

    def endpoints(self, record: Record | None = None) -> Endpoints | None:
        """Where the recorded stack is; None if it is not up."""
        keys, record = self.keys(), record or self.record()
        if keys is None or not record.is_up or not {"store", "mlflow", "ray"} <= record.parts.keys():
            return None
        ports = {name: part.ports for name, part in record.parts.items()}
        return Endpoints(
            root=f"s3://{BUCKET}",
            s3_endpoint=f"http://127.0.0.1:{ports['store']['s3']}",
            access_key=keys.access_key,
            secret_key=keys.secret_key,
            region="us-east-1",
            mlflow=f"http://127.0.0.1:{ports['mlflow']['http']}",
            ray=f"127.0.0.1:{ports['ray']['gcs']}",
            ray_jobs=f"http://127.0.0.1:{ports['ray']['dashboard']}",
            ray_token_path=str(self.token_path),
            state=self.folder,
        )

    def ray_folder(self) -> Path:
        """Ray's own folder: in the state folder, or in /tmp if that path is too long for a socket or not ASCII.

        Ray's workers can open no other path.
        """
        inside = self.folder / "ray"
        if str(inside).isascii() and len(str(inside)) <= LONGEST_SOCKET_FOLDER:
            return _private_folder(inside)
        name = f"vit-{os.getuid()}-{hashlib.sha256(os.fsencode(self.folder)).hexdigest()[:10]}"
        # Ray opens its folder to everybody; this one above stays shut.
        return _private_folder(_private_folder(Path(tempfile.gettempdir()) / name) / "ray")

    @contextlib.contextmanager
    def locked(self, say: Callable[[str], None], seconds: float = 300.0) -> Iterator[None]:
        """One at a time starts or stops parts; the kernel frees the lock of a killed process."""
        deadline, told = time.monotonic() + seconds, False
        with (self.folder / "lock").open("a+") as file:
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if not told:
                        say("another command is starting or stopping the stack; waiting for it")
                        told = True
                    if time.monotonic() > deadline:
                        raise StackError(
                            f"{self.folder / 'lock'} was held for {seconds:.0f} s; end its holder (`fuser` names it)"
                        ) from None
                    time.sleep(0.1)
            yield

    def child_environment(self, part: str) -> dict[str, str]:
        """The caller's environment without what belongs to another stack, and with the part's mark."""
        environment = dict(os.environ)
        for name in list(environment):
            if name.startswith(("RAY_", "WEED_", "_MLFLOW", "MLFLOW_")):
                environment.pop(name)
        environment[PART_MARK] = self.mark(part)
        return environment


def _private_folder(path: Path) -> Path:
    path.mkdir(exist_ok=True, mode=0o700)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise StackError(f"{path} belongs to another user or is a link; set VIT_STATE to a folder with a shorter path")
    path.chmod(0o700)
    return path


def write_private(path: Path, text: str | bytes) -> Path:
    """Write a file that only its owner reads; whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    data: Any = text.encode() if isinstance(text, str) else text
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    return path
