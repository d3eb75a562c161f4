"""Identity: the same command returns, resumes or waits; the result object is the commit."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipelines import identity, store
from pipelines.config import Strict, how, input_
from pipelines.identity import Attempt, Held, LeaseLost, StageResult, digest_of, find_result, result_of, run_stage


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner(Strict):
    width: int = 8
    depth: int = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe(Strict):
    corpus: str = input_(default="a")
    seed: int = 0
    inner: Inner = field(default_factory=Inner)
    workers: int = how(default=1)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))
    return tmp_path / "root" / "runs"


class Work:
    def __init__(self) -> None:
        self.attempts: list[Attempt] = []

    def __call__(self, attempt: Attempt) -> StageResult:
        self.attempts.append(attempt)
        return attempt.result(uri=attempt.uri, run_id=None, metrics={"x": 1.0}, note="made")


INPUTS = {"corpus": "c" * 64}


def test_only_what_decides_the_result_is_in_the_digest() -> None:
    base = digest_of("toy", 1, Recipe(), INPUTS)
    assert digest_of("toy", 1, Recipe(workers=7, corpus="elsewhere"), INPUTS) == base
    assert digest_of("toy", 1, Recipe(seed=0, inner=Inner(width=8)), INPUTS) == base
    others = [
        digest_of("toy", 1, Recipe(seed=1), INPUTS),
        digest_of("toy", 1, Recipe(inner=Inner(width=9)), INPUTS),
        digest_of("toy", 2, Recipe(), INPUTS),
        digest_of("other", 1, Recipe(), INPUTS),
        digest_of("toy", 1, Recipe(), {"corpus": "d" * 64}),
    ]
    assert len({base, *others}) == 6


def test_the_digest_of_a_known_recipe_never_changes() -> None:
    """Raise VERSION or restore the result: every finished run of every user is found by this law."""
    assert digest_of("toy", 1, Recipe(seed=3, inner=Inner(depth=5)), INPUTS) == (
        "423be3ad326b59e893b740a2f41b41f7b2143da5ce81c199917650bd06e532fc"
    )


def test_a_finished_run_is_returned_and_a_lost_result_is_made_again(runs: Path) -> None:
    work = Work()
    first = run_stage("toy", 1, Recipe(), INPUTS, work)
    second = run_stage("toy", 1, Recipe(workers=3), INPUTS, work)
    assert (first.reused, second.reused, len(work.attempts)) == (False, True, 1)
    assert second.details == {"note": "made"}
    assert find_result("toy", first.digest) == second
    assert result_of(first.uri + "/weights.safetensors") == second
    (runs / "toy" / first.digest / "result.json").unlink()
    third = run_stage("toy", 1, Recipe(), INPUTS, work)
    assert not third.reused
    assert [attempt.number for attempt in work.attempts] == [1, 2]
    assert work.attempts[1].name == f"toy-{first.digest[:12]}-a2"


def test_again_recomputes(runs: Path) -> None:
    work = Work()
    run_stage("toy", 1, Recipe(), INPUTS, work)
    token = identity.AGAIN.set(True)
    try:
        assert not run_stage("toy", 1, Recipe(), INPUTS, work).reused
    finally:
        identity.AGAIN.reset(token)
    assert len(work.attempts) == 2


def test_a_failed_run_leaves_no_result_and_the_same_command_resumes(runs: Path) -> None:
    def fail(attempt: Attempt) -> StageResult:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        run_stage("toy", 1, Recipe(), INPUTS, fail)
    assert find_result("toy", digest_of("toy", 1, Recipe(), INPUTS)) is None
    work = Work()
    run_stage("toy", 1, Recipe(), INPUTS, work)
    assert work.attempts[0].number == 2


def test_a_second_process_is_told_who_is_at_it(runs: Path) -> None:
    def nested(attempt: Attempt) -> StageResult:
        with pytest.raises(Held, match=f"process {os.getpid()} on .* \\(attempt 1\\)"):
            run_stage("toy", 1, Recipe(), INPUTS, Work())
        return Work()(attempt)

    run_stage("toy", 1, Recipe(), INPUTS, nested)


def test_a_holder_that_was_killed_is_taken_over_at_once(runs: Path) -> None:
    script = (
        "import os, signal, sys\n"
        "from tests.pipelines.test_identity import *\n"
        "run_stage('toy', 1, Recipe(), INPUTS, lambda attempt: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    folder = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script], cwd=folder, env={**os.environ, "PYTHONPATH": str(folder)})
    assert killed.returncode == -9
    work = Work()
    started = time.monotonic()
    run_stage("toy", 1, Recipe(), INPUTS, work)
    assert time.monotonic() - started < 5
    assert work.attempts[0].number == 2


def test_a_writer_that_lost_its_lease_commits_nothing(runs: Path) -> None:
    def overtaken(attempt: Attempt) -> StageResult:
        uri = store.join(attempt.root, "lease.json")
        store.write_json(uri, {**store.read_json(uri), "token": "somebody else", "attempt": 9})
        with pytest.raises(LeaseLost):
            attempt.check()
        return Work()(attempt)

    with pytest.raises(LeaseLost):
        run_stage("toy", 1, Recipe(), INPUTS, overtaken)
    assert find_result("toy", digest_of("toy", 1, Recipe(), INPUTS)) is None


def test_a_lease_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "RENEW_SECONDS", 0.05)
    uri = str(tmp_path / "lease.json")
    with identity.lease(uri, "toy") as held:
        before = store.read_json(uri)["expires"]
        time.sleep(0.3)
        assert store.read_json(uri)["expires"] > before
        held.check()
    assert store.read_json(uri)["expires"] == 0


def test_a_result_of_nothing_says_so(runs: Path) -> None:
    with pytest.raises(ValueError, match="names no stage run"):
        result_of("s3://bucket/whatever")
    with pytest.raises(ValueError, match="no result yet"):
        result_of(f"{runs}/toy/{'a' * 64}/attempts/1/x")


def test_the_code_fingerprint_needs_no_git_and_is_stable() -> None:
    assert identity.code_fingerprint() == identity.code_fingerprint()
    assert len(identity.code_fingerprint().split("-")[0]) == 16
