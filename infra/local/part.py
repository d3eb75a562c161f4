"""What every part of the embedded stack is: a name, its ports, how it starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from infra.endpoints import Endpoints
from infra.local.launch import Watch
from infra.local.processes import Process
from infra.local.state import State

__all__ = ["Launch", "Part", "Started"]


@dataclass(frozen=True, slots=True)
class Launch:
    """All that a part needs to start."""

    state: State
    endpoints: Endpoints  # Of the stack once it is up.
    ports: dict[str, int]  # The part's own, by name.
    watch: Watch


@dataclass(frozen=True, slots=True)
class Started:
    processes: tuple[Process, ...]  # Those without which the part is dead.
    sessions: tuple[int, ...]


class Part(Protocol):
    name: ClassVar[str]
    title: ClassVar[str]
    ports: ClassVar[tuple[str, ...]]
    asks: ClassVar[tuple[str, ...]]  # Parts whose addresses it is told at its start.

    def start(self, launch: Launch) -> Started:
        """Start and wait until it answers."""

    def turn(self, process: Process) -> int:
        """When the process is told to stop: those of turn 0 first."""

    def tidy(self, ports: dict[str, int]) -> None:
        """Remove what the stopped part leaves outside the state folder."""
