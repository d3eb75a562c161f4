"""The fuzz command finds an overflow that is planted in a copy of the sources, and nothing in the sources."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz.run import PLANTED

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not (shutil.which("clang") or shutil.which("gcc")) or not any(Path("/usr/include").glob("**/jpeglib.h")),
    reason="needs a compiler and libjpeg-turbo's headers",
)


def fuzz(*flags: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, "-m", "tests.fuzz.run", "--seconds", "3", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_overflow_is_found(planted: str) -> None:
    code, result = fuzz("--planted", planted)
    assert code == 0, result
    assert "AddressSanitizer" in result["found"]


def test_nothing_is_found_in_the_seeds_and_some_seconds_of_mutations() -> None:
    code, result = fuzz("--no-coverage")
    assert code == 0, result
    assert result["executions"] > 100
