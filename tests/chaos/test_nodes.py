"""Nodes that come, are taken away with notice, and are lost without: a range of workers goes on with what there is."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import identity, pretrain, store
from pipelines.training import cluster, worker
from tests.chaos.conftest import SAMPLES
from tests.chaos.nodes import Raylet, wait_for
from tests.chaos.strikes import ROUNDS, SLOW, draw, struck
from tests.chaos.trace import count, read

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
STEPS = 900


@pytest.mark.parametrize("number", range(ROUNDS))
@pytest.mark.parametrize("end", ["lost", *(["drained"] if ROUNDS > 1 else [])])
def test_workers_go_on_without_a_node_and_with_a_new_one(
    recipe_of: Callable[..., Any],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    end: str,
    number: int,
) -> None:
    moment = draw(capsys).randrange(10, 40)
    cluster.connect()
    share = 0.75 * cluster.shown()[0] / 2  # Two workers fit on the head, whatever machine this is, and never three.
    given = recipe_of(
        seed=200 + number + 10 * (end == "drained"),
        train={"total_steps": STEPS},
        workers={"count": [2, 3], "cpus": share, "resize_seconds": 0.0, "hang_seconds": 60.0},
    )
    monkeypatch.setattr(worker, "train_worker", struck(folder, []))
    (folder / SLOW).touch()
    digest = plan_digest(given)
    place = store.join(identity.runs(), "pretrain", digest, "attempts", "1")
    results: list[identity.StageResult] = []
    thread = threading.Thread(target=lambda: results.append(pretrain.run(given)), daemon=True)
    node = Raylet(math.ceil(share)) if end == "lost" else None
    thread.start()

    def shows(workers: int, steps: int) -> bool:
        """Whether so many work, and have taken so many steps since they started."""
        try:
            now, starts = store.read_json(f"{place}/progress.json"), store.read_json(f"{place}/starts.json")
        except store.NotFound:
            assert thread.is_alive(), "the run ended"
            return False
        return bool(now.get("workers") == workers and now.get("step", 0) >= starts[-1] + steps)

    if node is None:  # It comes in the middle of the run.
        wait_for(lambda: shows(2, 5))
        node = Raylet(math.ceil(share))
    try:
        wait_for(lambda: shows(3, moment))
        if end == "lost":
            node.kill()
        else:
            node.drain(120)
        wait_for(lambda: shows(2, 5))
        (folder / SLOW).unlink()
        thread.join(180)
    finally:
        node.close()
    assert results, "the run did not end"
    found = count(read(folder), SAMPLES, 16, STEPS)
    assert (found.lost, found.repeated) == (0, 0)
    # Growing and notice redo nothing; at a loss an upload may have been under way.
    assert sum(found.redone.values()) <= (20 if end == "lost" else 0)
    assert results[0].metrics["test/top1"] > 0.9


def plan_digest(recipe: Any) -> str:
    from pipelines.workflow.planning import plan

    return plan("pretrain", recipe).digest
