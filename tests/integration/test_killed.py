"""SIGKILL in the middle of a stage: nothing half done is taken for a result, and the same recipe finishes it."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pipelines import store
from pipelines.config import from_dict, to_yaml
from pipelines.identity import find_result, runs
from pipelines.workflow.planning import plan
from pipelines.workflow.stages import recipe_class, stage_run

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

RUN = """
import sys
from pipelines.config import load_recipe
from pipelines.workflow.stages import recipe_class, stage_run
stage_run(sys.argv[1])(load_recipe(recipe_class(sys.argv[1]), sys.argv[2]))
"""


def kill_and_run_again(stage: str, values: dict[str, Any], folder: Path, seconds: float) -> Any:
    """Killed within `seconds` of taking its lease; then the whole run. Returns its result."""
    recipe = from_dict(recipe_class(stage), values)
    path = folder / f"{stage}.yaml"
    path.write_text(to_yaml(recipe))
    digest = plan(stage, recipe).digest
    place = store.join(runs(), stage, digest)
    for item in list(store.list_objects(place)):  # Of an earlier test run on a kept stack.
        store.delete(item.uri)
    process = subprocess.Popen([sys.executable, "-c", RUN, stage, str(path)])
    deadline = time.monotonic() + 60
    while not store.exists(store.join(place, "lease.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    after = random.uniform(0.0, seconds)
    time.sleep(after)
    process.kill()
    process.wait()
    in_time = find_result(stage, digest) is None
    result = stage_run(stage)(recipe)
    told = f"{stage}, killed after {after:.2f} s"
    assert result.digest == digest and result.reused is not in_time, told
    assert store.read_json(store.join(place, "lease.json"))["attempt"] == 1 + in_time, told
    return result


def test_evaluate_and_promote_end_as_if_nothing_had_happened(first: dict[str, Any], tmp_path: Path) -> None:
    from pipelines.tracking.client import connect

    given = {"model": first["finetune"].result.uri, "corpus": first["shard"].result.uri, "split": "val"}
    evaluated = kill_and_run_again("evaluate", given, tmp_path, 2.0)
    assert evaluated.metrics["val/num_images"] == first["finetune"].result.metrics["val/images"]
    assert evaluated.metrics["val/top1"] == pytest.approx(first["finetune"].result.metrics["val/top1"])

    given = {"evaluation": evaluated.uri, "minimum": 0.1, "alias": "survivor"}
    promoted = kill_and_run_again("promote", given, tmp_path, 1.0)
    version = connect().get_model_version_by_alias("smoke", "survivor")
    assert promoted.uri == f"models:/smoke/{version.version}" and promoted.details["passed"]
