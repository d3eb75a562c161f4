"""What the Ray cluster is made of now: its nodes, those that will leave, and the room for workers. Ray's core alone."""

from __future__ import annotations

import contextlib
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipelines import store
from pipelines.progress import say
from pipelines.training.config import WorkerConfig
from pipelines.training.placement import Node, Placement, count_room, place

__all__ = ["choose_placement", "connect", "nodes", "room_for", "shown"]

ANSWER_SECONDS = 2.0  # That a node may take to accept a connection.


def connect() -> None:
    """Join the cluster that the environment names, or start one in this process."""
    import ray

    store.root()  # Puts the endpoints into the environment if needed.
    if not ray.is_initialized():
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="WARNING")


def choose_placement(workers: WorkerConfig) -> Placement:
    """From what the cluster shows now. The embedded head is one machine; any other cluster may still grow."""
    room = room_for({"CPU": workers.cpus})
    return place(workers, *shown(), can_grow="VIT_STATE" not in os.environ, room=room)


def shown() -> tuple[float, float]:
    """CPUs and GPUs of the cluster as it is now."""
    import ray

    resources = ray.cluster_resources()
    return float(resources.get("CPU", 0.0)), float(resources.get("GPU", 0.0))


def nodes(answering: bool = False) -> list[Node]:
    """The living nodes; Ray takes up to 20 s to call one dead. `answering`: only those that can be reached."""
    import ray

    def answers(node: dict[str, Any]) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
            return True
        return False

    leaving, living = draining(), [node for node in ray.nodes() if node["Alive"]]
    if answering:
        with ThreadPoolExecutor(64) as pool:
            living = [node for node, yes in zip(living, pool.map(answers, living), strict=True) if yes]
    return [Node(node["NodeID"], node["Resources"], node["NodeID"] in leaving) for node in living]


def draining() -> set[str]:
    """Ids of the nodes that Ray has been told to drain.

    Ray 2.60 shows them nowhere in public; Ray Train looks where this does. Should another Ray have moved it, training
    goes on without that warning: a node is then lost when it goes, and SIGTERM to a worker still counts as notice.
    """
    try:
        from ray._private.state import state

        return set(state.get_draining_nodes())
    except (ImportError, AttributeError, TypeError) as error:  # Moved or changed; what fails otherwise fails loudly.
        _say_blind(error)
        return set()


_blind = False


def _say_blind(error: Exception) -> None:
    """Once in a process."""
    global _blind
    if not _blind:
        _blind = True
        say(
            f"this Ray does not show which nodes are drained ({type(error).__name__}: {error}): workers are not moved "
            "before such a node goes, only after"
        )


def room_for(need: dict[str, float]) -> int:
    """How many workers there is room for now."""
    import ray

    return count_room(nodes(answering=True), ray.available_resources(), need)
