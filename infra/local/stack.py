"""Start, watch and stop the embedded stack: object store, MLflow server, Ray head.

A part is dead when one of its processes is gone, never because it is slow: a restart of the Ray head ends every running
job. Exactly the dead parts are restarted, and those that were told an address which had to change.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from infra.endpoints import LEAST_FREE_BYTES, Endpoints
from infra.local import ports, processes
from infra.local.errors import StackError
from infra.local.launch import Watch
from infra.local.mlflow_part import MlflowServer
from infra.local.object_store import ObjectStore
from infra.local.part import Launch, Part
from infra.local.processes import Process
from infra.local.ray_part import RayHead
from infra.local.state import PartRecord, Record, State

__all__ = ["PARTS", "PartStatus", "StackError", "attend", "down", "status"]

PARTS: tuple[Part, ...] = (ObjectStore(), MlflowServer(), RayHead())
START_SECONDS = 180.0
STOP_SECONDS = 15.0
LEFTOVER_SECONDS = 5.0  # For what is left of a dead part: nothing there has anything to save.

Say = Callable[[str], None]


def attend(state: State, *, start: bool = True, say: Say) -> Endpoints:
    """The stack's endpoints with every part alive; `say` hears what was started or restarted."""
    if (endpoints := _whole(state)) is not None:
        return endpoints
    if not start and not (state.keys() and state.record().is_up):
        raise StackError(f"no embedded stack runs in {state.folder}; start one with `vit up`")
    state.create()
    with state.locked(say):
        if (endpoints := _whole(state)) is not None:  # Somebody else started it while we waited.
            return endpoints
        _check_disk(state.folder)
        state.create_keys()
        record = state.record()
        _check_host(state, record)
        dead = {part.name for part in PARTS if not _is_alive(record.parts.get(part.name))}
        was_up = record.is_up
        for part in PARTS:
            if part.name in dead and was_up and (former := record.parts.get(part.name)) and former.processes:
                say(f"the {part.title} was dead ({_missing(former)}); restarting it")
        record = _clear(state, record, dead)
        record, moved = _settle_ports(record, dead, say)
        while told := {part.name for part in PARTS if part.name not in dead and moved & set(part.asks)}:
            for part in PARTS:
                if part.name in told:
                    say(f"the {part.title} is restarted too: it was told an address that changed")
            dead |= told
            record = _clear(state, record, told)
        if not was_up:
            say(f"starting the embedded stack in {state.folder}")
        record = _start(state, record, [part for part in PARTS if part.name in dead])
        endpoints = state.endpoints(record)
        assert endpoints is not None
        return endpoints


def down(state: State, *, say: Say, forget: bool = False) -> list[str]:
    """Stop what was started, and nothing else; names of the parts stopped."""
    if state.keys() is None:
        return []
    with state.locked(say):
        record = state.record()
        if forget:
            record = replace(record, host=socket.gethostname())
        _check_host(state, record)
        stopped = []
        with ThreadPoolExecutor(len(PARTS)) as pool:  # MLflow and Ray wait for no reply of the store's when they end.
            ended = {part.name: pool.submit(_stop, state, record, part, STOP_SECONDS) for part in PARTS}
            for part in PARTS:
                if ended[part.name].result():
                    stopped.append(part.title)
                if former := record.parts.get(part.name):
                    record = record.with_part(part.name, PartRecord(former.ports))
        state.save(record)
        return stopped


@dataclass(frozen=True, slots=True)
class PartStatus:
    title: str
    state: str  # "running", "dead: ...", "stopped"
    pids: tuple[int, ...]
    address: str
    memory_bytes: int
    log: Path


def status(state: State) -> list[PartStatus]:
    """One line for each part; never starts anything."""
    if state.keys() is None:
        return []
    record, lines = state.record(), []
    for part in PARTS:
        former = record.parts.get(part.name, PartRecord({}))
        living = processes.members(state.mark(part.name), former.processes, former.sessions)
        if _is_alive(former):
            condition = "running"
        elif former.processes:
            condition = f"dead: {_missing(former)}"
        else:
            condition = "stopped" if not living else "leftovers"
        pids = tuple(process.pid for process in former.processes if process.is_alive())
        address = _address(part, former)
        memory = processes.memory_pss(living)
        lines.append(PartStatus(part.title, condition, pids, address, memory, state.logs / f"{part.name}.log"))
    return lines


def _address(part: Part, record: PartRecord) -> str:
    public = {"store": "s3", "mlflow": "http", "ray": "dashboard"}[part.name]
    return f"http://127.0.0.1:{record.ports[public]}" if public in record.ports else ""


def _whole(state: State) -> Endpoints | None:
    """The endpoints if every part is alive; costs a few reads of /proc."""
    if state.keys() is None:
        return None
    record = state.record()
    return state.endpoints(record) if all(_is_alive(record.parts.get(part.name)) for part in PARTS) else None


def _is_alive(record: PartRecord | None) -> bool:
    return record is not None and bool(record.processes) and all(process.is_alive() for process in record.processes)


def _missing(record: PartRecord) -> str:
    gone = [process for process in record.processes if not process.is_alive()]
    return ", ".join(f"{process.name or 'its process'}, pid {process.pid}, is gone" for process in gone)


def _check_disk(folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < LEAST_FREE_BYTES:
        raise StackError(
            f"{free >> 20} MB free on the disk of {folder}; the stack needs {LEAST_FREE_BYTES >> 20} MB: free some, or "
            "set VIT_STATE to a folder on another disk"
        )


def _check_host(state: State, record: Record) -> None:
    """Two stacks on one folder of a shared disk would ruin its databases."""
    here = socket.gethostname()
    # A name may change; a start time counts from the boot, so none of another machine's processes seems to live here.
    known = any(process.is_alive() for part in record.parts.values() for process in part.processes)
    if record.is_up and record.host != here and not known:
        raise StackError(
            f"the stack in {state.folder} was started on {record.host}, this is {here}; run `vit down` there, or, if "
            "that machine is gone, `vit down --forget` here"
        )


def _clear(state: State, record: Record, names: Iterable[str]) -> Record:
    """End what is left of dead parts: half a Ray head, or the servers of a start that was killed before its record."""
    for part in PARTS:
        if part.name in names:
            _stop(state, record, part, LEFTOVER_SECONDS)
            former = record.parts.get(part.name)
            record = record.with_part(part.name, PartRecord(former.ports if former else {}))
    return record


def _stop(state: State, record: Record, part: Part, seconds: float) -> list[Process]:
    former = record.parts.get(part.name, PartRecord({}))
    mark = state.mark(part.name)
    stopped = processes.stop(lambda: processes.members(mark, former.processes, former.sessions), part.turn, seconds)
    part.tidy(former.ports)
    return stopped


def _settle_ports(record: Record, names: Iterable[str], say: Say) -> tuple[Record, set[str]]:
    """Free ports for parts about to start. Kept ones are used again; names of the parts whose ports had to change."""
    moved: set[str] = set()
    taken = {port for part in record.parts.values() for port in part.ports.values()}
    for part in PARTS:
        if part.name not in names:
            continue
        former = record.parts.get(part.name, PartRecord({})).ports
        kept = {name: former[name] for name in part.ports if name in former and ports.soon_free(former[name])}
        for name in former.keys() - kept.keys():
            other = ports.holder(former[name])
            say(f"port {former[name]} of the {part.title} was taken by {other}; it gets another one")
        fresh = ports.choose((name for name in part.ports if name not in kept), taken)
        taken |= set(fresh.values())
        if former and fresh:
            moved.add(part.name)
        record = record.with_part(part.name, PartRecord({name: (kept | fresh)[name] for name in part.ports}))
    return record, moved


def _start(state: State, record: Record, starting: list[Part]) -> Record:
    """Start all at once, so the slowest sets the time; what did start is recorded even if another part fails."""
    record = replace(record, host=socket.gethostname())
    state.save(record)
    # The addresses of a stack are known before it is up.
    planned = replace(
        record, parts={name: replace(p, processes=(Process(0, "planned"),)) for name, p in record.parts.items()}
    )
    endpoints = state.endpoints(planned)
    assert endpoints is not None
    watch = Watch(START_SECONDS)
    with ThreadPoolExecutor(len(PARTS)) as pool:
        running = {
            pool.submit(part.start, Launch(state, endpoints, record.parts[part.name].ports, watch)): part
            for part in starting
        }
        failed: list[Exception] = []
        try:
            for future in as_completed(running):
                name = running[future].name
                try:
                    started = future.result()
                except (StackError, OSError) as error:
                    failed.append(error)
                    _stop(state, record, running[future], LEFTOVER_SECONDS)
                    continue
                record = record.with_part(
                    name, PartRecord(record.parts[name].ports, started.processes, started.sessions)
                )
                state.save(record)
        except BaseException:
            watch.cancelled.set()
            raise
    if failed:
        raise StackError("\n".join(str(error) for error in failed)) from failed[0]
    return record
