"""Fixtures of the whole suite: one real stack (object store, MLflow, Ray) for every test that asks for it."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from infra.endpoints import Endpoints

ROOT = Path(__file__).parent.parent
NAMES = ("VIT_", "AWS_", "MLFLOW_", "RAY_")

# Ray reads it once, when it is imported, and collecting the tests may do that.
os.environ["RAY_AUTH_MODE"] = "token"

# On a busy machine an example of a millisecond may take a second: time is no property that these tests hold.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m "not stack"` leaves out whatever asks for the stack, also through other fixtures."""
    for item in items:
        if "stack_endpoints" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.stack)


@pytest.fixture(scope="session", autouse=True)
def _nothing_from_outside() -> Iterator[None]:
    """No test may reach somebody's real services: endpoints and keys of the shell are taken away."""
    given = {
        name: os.environ.pop(name) for name in list(os.environ) if name.startswith(NAMES) and name != "VIT_TEST_STATE"
    }
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))  # Ray workers import what is tested here.
    os.environ["VIT_STATE"] = "/nonexistent/vit-tests-without-stack"
    os.environ["RAY_AUTH_MODE"] = "token"
    yield
    os.environ.update(given)


@pytest.fixture(scope="session")
def stack_endpoints(_nothing_from_outside: None) -> Iterator[Endpoints]:
    """The embedded stack in a folder of its own; VIT_TEST_STATE=DIR keeps one between runs while developing."""
    from infra import endpoints
    from infra.local import stack
    from infra.local.state import State

    kept = os.environ.get("VIT_TEST_STATE")
    folder = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="vit-test-"))
    os.environ["VIT_STATE"] = str(folder / ".vit")
    before = dict(os.environ)
    try:
        found = endpoints.ensure()
        yield found
    finally:
        os.environ.clear()
        os.environ.update(before)
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()  # A driver that still hangs on when its cluster goes exits, without a word.
        if not kept:
            state = State.find()
            if state is not None:
                stack.down(state, say=lambda text: None)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def stack(stack_endpoints: Endpoints, monkeypatch: pytest.MonkeyPatch) -> Endpoints:
    """The running stack, its endpoints in the environment of this test."""
    for name, value in stack_endpoints.environment().items():
        monkeypatch.setenv(name, value)
    return stack_endpoints
