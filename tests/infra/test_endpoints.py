"""Endpoints: the environment first, then the state folder; a process of the stack itself starts nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from infra import cli, endpoints
from infra.endpoints import Endpoints
from infra.local.errors import StackError
from infra.local.processes import identify
from infra.local.stack import PARTS
from infra.local.state import PartRecord, State

GIVEN = {
    "VIT_ROOT": "s3://bucket/vit",
    "AWS_ENDPOINT_URL": "http://s3.example",
    "AWS_ACCESS_KEY_ID": "theirs",
    "AWS_SECRET_ACCESS_KEY": "hidden",
    "MLFLOW_TRACKING_URI": "http://mlflow.example",
}


def recorded(folder: Path) -> State:
    """A state folder whose parts live: this very process stands for each."""
    state = State(folder)
    state.create()
    state.create_keys()
    record, me = state.record(), identify(os.getpid())
    assert me
    for number, part in enumerate(PARTS):
        ports = {name: 20000 + 100 * number + i for i, name in enumerate(part.ports)}
        record = record.with_part(part.name, PartRecord(ports, (me,)))
    state.save(record)
    return state


def test_a_given_environment_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(tmp_path / ".vit")
    for name, value in GIVEN.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    for found in (endpoints.current(), endpoints.ensure()):
        assert found is not None
        assert found.root == "s3://bucket/vit" and found.mlflow == "http://mlflow.example"
        assert found.ray is None and found.state is None
    assert dict(os.environ) == before
    assert not (tmp_path / ".vit" / "lock").exists()


def test_only_the_root_need_be_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_ROOT", "/data/vit")
    found = endpoints.ensure()
    assert found == Endpoints(root="/data/vit")
    assert {"AWS_ENDPOINT_URL", "RAY_ADDRESS", "MLFLOW_TRACKING_URI"}.isdisjoint(found.environment())


def test_the_embedded_stack_is_found_and_put_into_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = recorded(tmp_path / ".vit")
    monkeypatch.setattr(os, "environ", Environment(os.environ))
    os.environ |= {"AWS_PROFILE": "work", "AWS_SESSION_TOKEN": "old", "NO_PROXY": "corp.example"}
    found = endpoints.ensure(start=False)
    assert found == endpoints.current() == state.endpoints()
    assert found.environment().items() <= os.environ.items()
    assert set(found.environment()) == {
        "VIT_ROOT",
        "VIT_STATE",
        "VIT_RAY_JOBS",
        "AWS_ENDPOINT_URL",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_DEFAULT_REGION",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_DISABLE_TELEMETRY",
        "MLFLOW_ALLOW_PICKLE_DESERIALIZATION",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
        "DO_NOT_TRACK",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN_PATH",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
    }
    assert "AWS_PROFILE" not in os.environ and "AWS_SESSION_TOKEN" not in os.environ
    assert os.environ["NO_PROXY"] == "corp.example,127.0.0.1,localhost"


class Environment(dict[str, str]):
    """A copy of os.environ, so that what a test applies ends with it."""


def test_a_copied_environment_follows_the_stack_when_it_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = recorded(tmp_path / ".vit")
    monkeypatch.setattr(os, "environ", Environment(os.environ))
    found = endpoints.ensure(start=False)
    record = state.record()
    former = record.parts["store"]
    state.save(record.with_part("store", PartRecord({**former.ports, "s3": 29999}, former.processes)))
    assert endpoints.ensure(start=False).s3_endpoint == "http://127.0.0.1:29999" != found.s3_endpoint
    assert os.environ["AWS_ENDPOINT_URL"] == "http://127.0.0.1:29999"


def test_a_root_of_ones_own_beside_the_stacks_environment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = recorded(tmp_path / ".vit")
    monkeypatch.setattr(os, "environ", Environment(os.environ))
    found = endpoints.ensure(start=False)  # As `eval "$(vit env)"` leaves a shell.
    os.environ["VIT_ROOT"] = "s3://vit/mine"
    for again in (endpoints.ensure(start=False), endpoints.current()):
        assert again is not None and again.root == "s3://vit/mine"
        assert again.s3_endpoint == found.s3_endpoint
    assert os.environ["VIT_ROOT"] == "s3://vit/mine"
    stored = state.endpoints()
    assert stored and stored.root == "s3://vit"  # MLflow keeps its artifacts where they were.


@pytest.mark.parametrize("given", ["https://mlflow.example", "sqlite:///mine.db", "./mlruns"])
def test_a_server_that_the_embedded_stack_replaces_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    recorded(tmp_path / ".vit")
    monkeypatch.setattr(os, "environ", Environment(os.environ))
    os.environ["MLFLOW_TRACKING_URI"] = given
    said: list[str] = []
    endpoints.ensure(start=False, say=said.append)
    assert len(said) == 1 and f"MLFLOW_TRACKING_URI={given} is not used" in said[0]
    assert "VIT_ROOT" in said[0]
    endpoints.ensure(start=False, say=said.append)
    assert len(said) == 1  # Its own address is no news.


def test_a_disk_that_is_nearly_full_is_said_before_the_store_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded(tmp_path / ".vit")
    monkeypatch.setattr(os, "environ", Environment(os.environ))
    disk = shutil.disk_usage(tmp_path)
    said: list[str] = []
    for free, total, says in ((3 << 30, 100 << 30, 0), (1 << 29, 10 << 30, 1), (15 << 30, 1000 << 30, 2)):
        full = disk._replace(free=free, total=total)
        monkeypatch.setattr("shutil.disk_usage", lambda path, full=full: full)
        endpoints.ensure(start=False, say=said.append)
        assert len(said) == says, said
    assert all("refuses writes: free some there" in line for line in said)
    monkeypatch.delitem(os.environ, "VIT_STATE")  # Somebody else's store: its disk is not this one.
    assert endpoints.lack_of_space() is None


def test_a_process_of_the_stack_itself_takes_its_environment_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = recorded(tmp_path / ".vit")
    found = state.endpoints()
    assert found
    for name, value in found.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("VIT_PART", state.mark("ray"))
    state.save(state.record().with_part("ray", PartRecord({})))  # The head died; its orphans must not start another.
    assert endpoints.ensure() == found


def test_without_a_stack_and_without_leave_to_start_one_it_is_an_error(tmp_path: Path) -> None:
    assert endpoints.current() is None
    with pytest.raises(StackError, match=r"no embedded stack runs in .*vit up"):
        endpoints.ensure(start=False)
    assert not (tmp_path / ".vit").exists()


def test_the_secret_key_is_in_no_representation(tmp_path: Path) -> None:
    found = recorded(tmp_path / ".vit").endpoints()
    assert found and found.secret_key and found.secret_key not in repr(found)


def test_the_lines_of_vit_env_survive_a_shell(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    state = recorded(tmp_path / "a folder" / ".vit")
    assert cli.main("env", ["--state", str(state.folder)]) == 0
    script = capfd.readouterr().out + 'echo "$AWS_SECRET_ACCESS_KEY|$RAY_AUTH_TOKEN_PATH|$VIT_ROOT"'
    shell = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert shell.stdout.strip() == f"{state.require_keys().secret_key}|{state.token_path}|s3://vit"


@pytest.mark.parametrize("verb", ["status", "env"])
def test_a_verb_without_a_stack_says_how_to_start_one(
    tmp_path: Path, verb: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(verb, []) == 1
    out, err = capfd.readouterr()
    assert "start one with `vit up`" in out + err
    assert not (tmp_path / ".vit").exists()


def test_down_without_a_stack_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main("down", []) == 0
    assert "nothing runs" in capfd.readouterr().out
