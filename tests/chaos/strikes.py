"""Misfortune that strikes a train worker from within, once, at a known step of a known rank."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pipelines.batch import Batch
from tests.chaos.trace import Writer

__all__ = ["KINDS", "ROUNDS", "Strike", "draw", "struck", "struck_at"]

ROUNDS = int(os.environ.get("VIT_CHAOS_ROUNDS", "1"))  # `make chaos` asks for five moments of each kind.
SEED = os.environ.get("VIT_CHAOS_SEED")
KINDS = ("kill", "memory", "hang", "notice")
SLOW = "slow"  # While this file lies in the folder every step takes a moment.


@dataclass(frozen=True)
class Strike:
    kind: str
    step: int
    rank: int


def draw(capsys: Any) -> random.Random:
    """Moments by a seed that is printed; VIT_CHAOS_SEED repeats one."""
    seed = int(SEED) if SEED else random.SystemRandom().randrange(10**6)
    with capsys.disabled():
        print(f"\nchaos: VIT_CHAOS_SEED={seed}", flush=True)
    return random.Random(seed)


def struck(folder: Path, strikes: list[Strike]) -> Callable[[dict[str, Any]], None]:
    """What every rank runs in place of `worker.train_worker`: the same, with a trace of its samples and the strikes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "strikes.json").write_text(json.dumps([asdict(strike) for strike in strikes]))

    def run(config: dict[str, Any]) -> None:
        train(config, folder)

    return run


def struck_at(folder: Path, strike: Strike) -> float:
    """When it struck; raises FileNotFoundError if it did not."""
    return float((folder / f"struck-{strike.kind}-{strike.step}").read_text())


def train(config: dict[str, Any], folder: Path) -> None:
    import ray.train

    from pipelines.training import worker

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    strikes = [Strike(**one) for one in json.loads((folder / "strikes.json").read_text())]
    writer: list[Writer] = []

    def watch(batch: Batch) -> None:
        if not writer:
            writer.append(Writer(folder, rank, config["job"].attempt))
        writer[0](batch)
        if (folder / SLOW).exists():
            time.sleep(0.1)
        for strike in strikes:
            if strike.step == batch.step and strike.rank % world_size == rank and is_first(folder, strike):
                globals()[strike.kind]()

    worker.train_worker({**config, "watch": watch})


def is_first(folder: Path, strike: Strike) -> bool:
    try:
        with (folder / f"struck-{strike.kind}-{strike.step}").open("x") as file:
            file.write(str(time.time()))
    except FileExistsError:
        return False
    return True


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def memory() -> None:
    """The system gives no more: the allocation itself fails, and nobody else's memory is taken for it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), before[1]))
    try:
        torch.empty(1 << 30, dtype=torch.uint8).fill_(1)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def hang() -> None:
    time.sleep(3600)


def notice() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
