"""Workers that are killed, get no memory, hang, or are told that they will be ended: the weights are the same."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines import identity, pretrain, store
from pipelines.training import worker
from tests.chaos.conftest import SAMPLES
from tests.chaos.strikes import KINDS, ROUNDS, Strike, draw, struck, struck_at
from tests.chaos.trace import count, read

pytestmark = [pytest.mark.stack, pytest.mark.timeout(400)]
STEPS, INTERVAL = 240, 10


def tensors_of(uri: str) -> dict[str, str]:
    from safetensors.numpy import load

    return {name: hashlib.sha256(array.tobytes()).hexdigest() for name, array in load(store.read(uri)).items()}


def points(run_id: str, key: str) -> list[int]:
    from mlflow.tracking import MlflowClient

    return [metric.step for metric in MlflowClient().get_metric_history(run_id, key)]


def curve(run_id: str, key: str) -> list[float]:
    """Values by step."""
    from mlflow.tracking import MlflowClient

    history = MlflowClient().get_metric_history(run_id, key)
    return [metric.value for metric in sorted(history, key=lambda metric: metric.step)]


@pytest.mark.parametrize("number", range(ROUNDS))
def test_four_misfortunes_in_one_run_change_nothing(
    recipe_of: Callable[..., Any], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: int
) -> None:
    moments = draw(capsys)
    kinds = moments.sample(KINDS, len(KINDS))
    # Each in a checkpoint interval of its own: four starts from the same step would be given up, and rightly so.
    strikes = [
        Strike(kind, 30 + 45 * place + moments.randrange(25), moments.randrange(2)) for place, kind in enumerate(kinds)
    ]
    given = recipe_of(seed=100 + number)
    monkeypatch.setattr(worker, "train_worker", struck(folder, strikes))
    hit = pretrain.run(given)
    told = f"{strikes}"
    for strike in strikes:
        struck_at(folder, strike)
    starts = store.read_json(hit.uri.replace("weights.safetensors", "starts.json"))
    assert len(starts) >= 1 + len(strikes), told
    found = count(read(folder), SAMPLES, 16, STEPS)
    assert (found.lost, found.repeated) == (0, 0), told
    assert max(found.redone.values()) <= 2 * INTERVAL, told  # An upload may have been under way.
    after_notice = 2 + kinds.index("notice")
    if len(starts) == 1 + len(strikes):
        assert found.redone[1, after_notice] == 0, told
    assert hit.run_id is not None and hit.metrics["test/top1"] > 0.9
    assert points(hit.run_id, "train/loss") == list(range(5, STEPS + 1, 5)), told
    loads = points(hit.run_id, f"system/{socket.gethostname()}/system_memory_usage_percentage")
    assert len(loads) > len(strikes) and loads == sorted(set(loads)), told
    spent = curve(hit.run_id, "cost/dollars")
    assert spent == sorted(spent) and len(spent) == STEPS // 5, told

    monkeypatch.setattr(worker, "train_worker", struck(folder / "whole", []))
    token = identity.AGAIN.set(True)
    try:
        whole = pretrain.run(given)
    finally:
        identity.AGAIN.reset(token)
    assert tensors_of(whole.uri) == tensors_of(hit.uri) and whole.uri != hit.uri, told
