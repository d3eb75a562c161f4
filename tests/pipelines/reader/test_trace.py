"""What the consumer wrote down: killed at random and resumed at other world sizes, it is what a whole run writes."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.endpoints import Endpoints
from pipelines.corpus.manifest import Corpus

from .tracer import BATCH, Trace, read, stream, together

ROOT = Path(__file__).parent.parent.parent.parent
STEPS = 27  # Four epochs of 103 images and a little.
IMAGES = 103


@pytest.fixture(scope="module")
def whole(corpus: Corpus) -> Trace:
    return list(together([stream(corpus, total_steps=STEPS)]))


def test_every_epoch_shows_every_image_exactly_once(whole: Trace) -> None:
    seen = Counter((epoch, sample) for step in whole for epoch, sample, _ in step)
    assert max(seen.values()) == 1
    per_epoch = Counter(epoch for epoch, _ in seen)
    assert per_epoch[0] == per_epoch[1] == per_epoch[2] == IMAGES
    assert sum(seen.values()) == STEPS * BATCH


@settings(max_examples=12, deadline=None)
@given(lives=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([1, 2, 3, 4])), min_size=1, max_size=6))
def test_any_chain_of_interrupted_runs_gives_the_trace_of_one(
    corpus: Corpus, whole: Trace, lives: list[tuple[int, int]]
) -> None:
    """Each life has its own number of workers, ends after some steps, and the next one knows nothing but the step."""
    found: Trace = []
    for number, (steps, world_size) in enumerate([*lives, (STEPS, 1)]):
        start = len(found)
        ranks = [
            stream(corpus, rank=rank, world_size=world_size, start_step=start, total_steps=STEPS)
            for rank in range(world_size)
        ]
        limit = STEPS if number == len(lives) else min(STEPS, start + steps)
        if limit > start:
            for step in together(ranks):
                found.append(step)
                if len(found) == limit:
                    break
        for rank in ranks:
            rank.close()
    assert found == whole


def kill_and_resume(corpus: Corpus, trace: Path, backend: str, worlds: list[int], seed: int) -> None:
    """Start a consumer, SIGKILL it after a random number of steps, start the next one from what it has written."""
    source = random.Random(seed)
    for number, world_size in enumerate(worlds):
        start = len(read(trace)) if trace.exists() else 0
        is_last = number == len(worlds) - 1
        if trace.exists():  # As with a checkpoint: what was cut off is gone.
            lines = trace.read_text().splitlines(keepends=True)[:start]
            trace.write_text("".join(lines))
        options: dict[str, Any] = {
            "corpus": corpus.reference,
            "trace": str(trace),
            "start": start,
            "stop": STEPS,
            "world_size": world_size,
            "backend": backend,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.pipelines.reader.tracer", json.dumps(options)], cwd=ROOT
        )
        goal = start + source.randint(1, 6)
        deadline = time.monotonic() + 120
        while process.poll() is None and (is_last or not trace.exists() or len(read(trace)) < goal):
            assert time.monotonic() < deadline
            time.sleep(0.002)
        if not is_last:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        assert code == 0 or not is_last


def test_killed_without_warning_and_resumed_at_other_world_sizes(corpus: Corpus, whole: Trace, tmp_path: Path) -> None:
    kill_and_resume(corpus, tmp_path / "trace", "local", [1, 3, 2, 4], seed=1)
    assert read(tmp_path / "trace") == whole


@pytest.mark.stack
def test_the_same_on_ray(corpus: Corpus, whole: Trace, tmp_path: Path, stack: Endpoints) -> None:
    kill_and_resume(corpus, tmp_path / "trace", "ray", [1, 3, 2, 4], seed=2)
    assert read(tmp_path / "trace") == whole
