from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from pipelines.training.faults import Faults
from pipelines.training.watchdog import EXIT_CODE, Watchdog

HANGS = """
import sys, time
from pipelines.training.faults import Faults
from pipelines.training.watchdog import Watchdog

def waits_for_ever():
    time.sleep(120)

faults = Faults(sys.argv[1], rank=3)
with Watchdog(0.5, lambda text: faults.write_stacks(17, 0.5, text)):
    waits_for_ever()
"""


def test_a_worker_that_hangs_ends_and_says_where_it_stood(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], cwd=Path(__file__).parents[3], timeout=60)
    assert done.returncode == EXIT_CODE
    assert "waits_for_ever" in (tmp_path / "stacks-3.txt").read_text()
    assert "worker 3 failed at step 17" in Faults(str(tmp_path), 0).say_last()
    assert "no progress for 0 s" in Faults(str(tmp_path), 0).say_last()


def test_signs_of_life_keep_it_alive() -> None:
    reports: list[str] = []
    with Watchdog(0.6, reports.append) as watchdog:
        for _ in watchdog.over(range(8)):
            time.sleep(0.15)
    assert not reports


def test_without_a_limit_nothing_is_watched() -> None:
    with Watchdog(None, lambda text: None) as watchdog:
        assert watchdog._thread is None


def test_a_start_with_smaller_pieces_is_not_the_same_start_again(tmp_path: Path) -> None:
    faults = Faults(str(tmp_path), 0)
    assert [faults.record_start(5), faults.record_start(5), faults.record_start(5, smaller=True)] == [1, 2, 1]
    assert faults.record_start(5) == 2
    assert faults.record_start(6) == 1
