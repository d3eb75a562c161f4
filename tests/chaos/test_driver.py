"""Ctrl-C, and a driver that dies: the same command goes on where it was."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines import identity, store
from pipelines.config import to_yaml
from pipelines.workflow.planning import plan
from tests.chaos.conftest import SAMPLES
from tests.chaos.nodes import wait_for
from tests.chaos.strikes import ROUNDS, SLOW, draw
from tests.chaos.test_workers import points
from tests.chaos.trace import count, read

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]
STEPS = 420


@pytest.mark.parametrize("number", range(ROUNDS))
def test_ctrl_c_then_kill_9_then_the_same_command_finishes(
    recipe_of: Callable[..., Any], folder: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    moments = draw(capsys)
    given = recipe_of(
        seed=300 + number,
        train={"total_steps": STEPS},
        checkpoint={"every_steps": 20},
        reader={"backend": "ray"},
        validation={"every_epochs": 11},
    )
    path = folder / "recipe.yaml"
    folder.mkdir()
    (folder / SLOW).touch()  # Else the run may be over before it is struck.
    path.write_text(to_yaml(given))
    digest = plan("pretrain", given).digest
    place = store.join(identity.runs(), "pretrain", digest)
    command = [sys.executable, "-m", "tests.chaos.driver", str(path), str(folder)]

    def start() -> subprocess.Popen[str]:
        # Tests that a shell has put into the background ignore Ctrl-C, and their children would too.
        heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=heard)

    def reached(attempt: int, field: str, at_least: int) -> bool:
        try:
            now = store.read_json(store.join(place, "attempts", str(attempt), "progress.json"))
        except store.NotFound:
            return False
        return bool(now.get(field, 0) >= at_least)

    first = start()
    interrupt_at = moments.randrange(20, 60)
    wait_for(lambda: reached(1, "step", interrupt_at))
    first.send_signal(signal.SIGINT)
    output = first.communicate(timeout=200)[0]
    assert first.returncode == 130, output
    assert "the same command resumes at step" in output

    second = start()
    kill_at = moments.randrange(100, 180)
    wait_for(lambda: reached(2, "checkpoint", kill_at))
    second.kill()
    second.communicate()

    (folder / SLOW).unlink()
    third = start()
    output = third.communicate(timeout=200)[0]
    assert third.returncode == 0, output
    assert "resumed from the checkpoint at step" in output
    result = identity.find_result("pretrain", digest)
    assert result is not None and result.run_id is not None
    assert points(result.run_id, "train/loss") == list(range(5, STEPS + 1, 5))
    found = count(read(folder), SAMPLES, 16, STEPS)
    assert (found.lost, found.repeated) == (0, 0)
    assert found.redone[2, 1] == 0, "Ctrl-C redoes nothing"
