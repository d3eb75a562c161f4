"""The chain on a tiny corpus, run once for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipelines import cli
from tests.integration.images import write_digits

if TYPE_CHECKING:
    from infra.endpoints import Endpoints


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("raw") / "images")


@pytest.fixture(autouse=True)
def own_root(stack: Endpoints, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A place of its own in the bucket: other tests may run the same tiny recipes."""
    monkeypatch.setenv("VIT_ROOT", f"{stack.root}/chain")
    yield


def run(images: Path, *flags: str, **more: dict[str, Any]) -> dict[str, Any]:
    """Run the workflow as `vit run` does, with more values by step; outcomes by step."""
    from pipelines.workflow.report import say_step
    from pipelines.workflow.spec import load_workflow

    values = {"shard": {"source": str(images)}, "predict": {"images": str(images / "digit-1"), "split": None}}
    return cli.run_workflow(load_workflow("smoke", {**values, **more}), plain="--plain" in flags, observe=say_step)


@pytest.fixture(scope="session")
def first(stack_endpoints: Endpoints, images: Path) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in stack_endpoints.environment().items():
            patch.setenv(name, value)
        patch.setenv("VIT_ROOT", f"{stack_endpoints.root}/chain")
        return run(images)
