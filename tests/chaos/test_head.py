"""The embedded Ray head dies under a run: the same command starts it again and goes on. `make chaos` alone runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from infra.local.state import State
from tests.chaos.nodes import wait_for
from tests.chaos.strikes import ROUNDS, draw

pytestmark = [
    pytest.mark.stack,
    pytest.mark.timeout(600),
    pytest.mark.skipif(ROUNDS == 1, reason="a stack of its own, two minutes: `make chaos` runs it"),
]


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Of a user whose stack nobody else uses."""
    from infra.endpoints import current

    known = current()
    named = {*known.environment()} if known else set()
    own = {name: value for name, value in os.environ.items() if name not in named}
    own["VIT_STATE"] = str(tmp_path / ".vit")
    yield own
    subprocess.run([sys.executable, "-m", "pipelines", "down"], env=own, timeout=90, check=True, cwd=tmp_path)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_the_same_command_resumes_what_a_dead_head_left(
    environment: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    kill_at = draw(capsys).randrange(60, 200)

    def vit(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "pipelines", *arguments]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=environment, cwd=tmp_path, **pipes)

    for shade, name in enumerate(("dark", "light")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(80):
            Image.new("L", (16, 16), 90 * shade + index).save(tmp_path / "images" / name / f"{index}.png")
    first = vit("shard", "smoke/shard")
    output = first.communicate(timeout=200)[0]
    assert first.returncode == 0, output
    train = ("pretrain", "smoke/pretrain", "--train.total-steps", "600", "--checkpoint.every-steps", "20")

    struck = vit(*train)
    lines: list[str] = []

    def reached() -> bool:
        assert struck.stdout is not None
        lines.append(line := struck.stdout.readline())
        assert line, "".join(lines)
        found = re.search(r"([\d,]+)/600 steps", line)
        return bool(found and int(found[1].replace(",", "")) >= kill_at)

    wait_for(reached)
    for process in State(Path(environment["VIT_STATE"])).record().parts["ray"].processes:
        os.kill(process.pid, signal.SIGKILL)
    output = struck.communicate(timeout=300)[0]
    assert struck.returncode not in (0, None), output

    second = vit(*train)
    output = second.communicate(timeout=300)[0]
    assert second.returncode == 0, output
    assert "the Ray head was dead" in output
    assert "resumed from the checkpoint at step" in output
