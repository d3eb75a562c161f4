"""`vit up | down | status | env`: the embedded stack from the command line."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from infra.local.state import State

__all__ = ["VERBS", "main"]

VERBS = {
    "up": "start the object store, MLflow and Ray on this machine, or attach to them",
    "down": "stop what `vit up` started; data stays",
    "status": "what runs where, with its memory",
    "env": 'lines for `eval "$(vit env)"`; they hold the secret key',
}


def main(verb: str, argv: Sequence[str]) -> int:
    """Run one verb; 0: done, 1: not as asked."""
    arguments = _parser(verb).parse_args(argv)
    from rich.console import Console

    from infra.local.errors import StackError
    from infra.local.state import State

    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if arguments.state is not None:
        state = State(arguments.state.expanduser().absolute())
    else:
        state = State.find() or State.default()
    try:
        match verb:
            case "up":
                return _up(console, state)
            case "down":
                return _down(console, state, arguments.forget)
            case "status":
                return _status(console, state)
            case _:
                return _env(state)
    except StackError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"vit {verb}: {error}", markup=False)
        return 1


def _parser(verb: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"vit {verb}", description=VERBS[verb])
    parser.add_argument("--state", type=Path, metavar="DIR", help="state folder (default: VIT_STATE or .vit)")
    if verb == "down":
        parser.add_argument("--forget", action="store_true", help="the stack was started on a machine that is gone")
    return parser


def _up(console: Console, state: State) -> int:
    from infra.local.stack import attend

    started = time.monotonic()
    notices: list[str] = []

    def say(text: str) -> None:
        notices.append(text)
        console.print(text, markup=False)

    endpoints = attend(state, say=say)
    seconds = time.monotonic() - started
    console.print(f"ready after {seconds:.0f} s" if notices else "already running", markup=False)
    for title, where in (
        ("S3", f"{endpoints.s3_endpoint}  {endpoints.root}"),
        ("MLflow", endpoints.mlflow),
        ("Ray", endpoints.ray_jobs),
        ("state", endpoints.state),
    ):
        console.print(f"  {title:<7}{where}", markup=False)
    console.print("commands of vit find it by themselves; other programs: " + _eval(state), markup=False)
    return 0


def _eval(state: State) -> str:
    return f'eval "$(vit env --state {shlex.quote(str(state.folder))})"'


def _down(console: Console, state: State, forget: bool) -> int:
    from infra.local.stack import down

    def say(text: str) -> None:
        console.print(text, markup=False)

    stopped = down(state, say=say, forget=forget)
    what = f"stopped: {', '.join(stopped)}; data stays in" if stopped else "nothing runs in"
    say(f"{what} {state.folder}")
    return 0


def _status(console: Console, state: State) -> int:
    from rich.table import Table

    from infra.local.stack import status

    lines = status(state)
    if not lines:
        console.print(f"no embedded stack in {state.folder}; start one with `vit up`", markup=False)
        return 1
    table = Table(box=None, pad_edge=False)
    for column in ("part", "state", "pid", "address", "memory", "log"):
        table.add_column(column, no_wrap=column != "state")
    for line in lines:
        pid = f"{line.pids[0]}{f' +{len(line.pids) - 1}' if len(line.pids) > 1 else ''}" if line.pids else ""
        memory, log = f"{line.memory_bytes / 1e6:.0f} MB", line.log.relative_to(state.folder)
        table.add_row(line.title, line.state, pid, line.address, memory, str(log))
    console.print(table)
    console.print(
        f"memory (PSS) {sum(line.memory_bytes for line in lines) / 1e6:.0f} MB, state {state.folder}", markup=False
    )
    return 0 if all(line.state == "running" for line in lines) else 1


def _env(state: State) -> int:
    from infra.local.errors import StackError

    endpoints = state.endpoints()
    if endpoints is None:
        raise StackError(f"no embedded stack runs in {state.folder}; start one with `vit up`")
    for name, value in endpoints.environment().items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")
    sys.stdout.write(f"export NO_PROXY={shlex.quote(_no_proxy())} no_proxy={shlex.quote(_no_proxy())}\n")
    return 0


def _no_proxy() -> str:
    from infra.endpoints import clean_for_loopback

    environment = dict(os.environ)
    clean_for_loopback(environment)
    return environment["NO_PROXY"]
