"""What the tests of this folder share: a corpus that is learned in seconds, and a recipe for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import from_dict
from pipelines.pretrain import PretrainRecipe
from tests.pipelines.tracking.toys import own_root

SAMPLES = 480


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    from tests.pipelines.tiny_corpus import write_colours

    return write_colours(str(tmp_path_factory.mktemp("chaos") / "colours"), train=SAMPLES).reference


@pytest.fixture
def recipe_of(stack: Any, colours: str, monkeypatch: pytest.MonkeyPatch) -> Callable[..., PretrainRecipe]:
    """A recipe with these changes, to run in a root of this test's own."""
    own_root(monkeypatch)

    def make(**changes: Any) -> PretrainRecipe:
        values: dict[str, Any] = {
            "corpus": colours,
            "resolution": 16,
            "model": {"patch_size": 4, "width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2, "dropout": 0.1},
            "train": {"batch_size": 16, "total_steps": 240},
            "optimizer": {"kind": "adamw", "peak_lr": 2e-3},
            "schedule": {"warmup_steps": 5},
            "augment": {"crop": "none"},
            "lanes": 4,
            "reader": {"backend": "local"},
            "validation": {"split": "val", "test_split": "test", "every_epochs": 4},
            "checkpoint": {"every_steps": 10},
            "workers": {
                "count": 2,
                "log_every_steps": 5,
                "hang_seconds": 20.0,
                "node_load_seconds": 0.2,
                "dollars_per_hour": 1.0,
            },
        }
        for name, change in changes.items():
            values[name] = {**values[name], **change} if isinstance(change, dict) and name in values else change
        return from_dict(PretrainRecipe, values)

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "trace"
