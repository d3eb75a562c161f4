"""The same work on the CPUs of every node, and with a node that is lost meanwhile."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipelines.corpus.parallel import map_items
from pipelines.shard import ShardRecipe, make_corpus
from tests.chaos.nodes import Raylet

from .inputs import class_folders

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]
ITEMS = 24


def where(item: Mapping[str, Any], seconds: float) -> Mapping[str, Any]:
    """Runs in a Ray worker."""
    import ray

    time.sleep(seconds)
    return {"node": ray.get_runtime_context().get_node_id(), "i": item["i"]}


@pytest.fixture
def second(stack: Any) -> Iterator[Raylet]:
    import ray

    if not ray.is_initialized():
        ray.init(address=stack.ray, log_to_driver=False, logging_level="WARNING")
    node = Raylet(2)
    yield node
    node.close()


def test_shards_are_made_on_every_node_and_the_corpus_is_the_same(second: Raylet, tmp_path: Path) -> None:
    items = [{"i": i} for i in range(ITEMS)]
    done = list(map_items(where, items, 0.5, num_workers=None))
    assert sorted(result["i"] for _, result in done) == list(range(ITEMS))
    assert {result["node"] for _, result in done} > {second.id}  # There and elsewhere.
    source = class_folders(tmp_path / "s", {"cat": 30, "dog": 30})
    made = {
        make_corpus(
            ShardRecipe(source=str(source), destination=str(tmp_path / name), shard_bytes=2000, num_workers=workers)
        ).digest
        for name, workers in (("alone", 0), ("nodes", None))
    }
    assert len(made) == 1


def test_what_a_lost_node_had_begun_is_done_on_another(second: Raylet) -> None:
    items = [{"i": i} for i in range(ITEMS)]
    done = []
    for _, result in map_items(where, items, 1.0, num_workers=None):
        if not done:
            second.kill()
        done.append(result)
    assert sorted(result["i"] for result in done) == list(range(ITEMS))
