"""Identity: the same command returns, resumes or waits; the result object is the commit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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


@contextmanager
def again(recompute: bool, token: str | None = None) -> Iterator[None]:
    """As `--again` does; with a token as that of a whole workflow does."""
    was = identity.AGAIN.set(recompute), identity.AGAIN_OF.set(token)
    try:
        yield
    finally:
        identity.AGAIN.reset(was[0])
        identity.AGAIN_OF.reset(was[1])


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
    with again(True):
        assert not run_stage("toy", 1, Recipe(), INPUTS, work).reused
        assert not run_stage("toy", 1, Recipe(), INPUTS, work).reused
    assert [(attempt.number, attempt.first) for attempt in work.attempts] == [(1, 1), (2, 2), (3, 3)]


def interrupted(attempt: Attempt) -> StageResult:
    raise KeyboardInterrupt


def test_an_interrupted_again_is_resumed_by_the_same_command_and_not_begun_anew(runs: Path) -> None:
    work = Work()
    first = run_stage("toy", 1, Recipe(), INPUTS, work)
    with again(True):
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run_stage("toy", 1, Recipe(), INPUTS, interrupted)
        assert run_stage("toy", 1, Recipe(), INPUTS, work).uri != first.uri
    resumed = work.attempts[1]
    assert (resumed.number, resumed.first) == (4, 2)
    (runs / "toy" / first.digest / "result.json").unlink()
    run_stage("toy", 1, Recipe(), INPUTS, work)
    assert work.attempts[2].first == 2, "what was made before the --again does not count"


def test_until_it_is_finished_an_again_changes_nothing_for_others(runs: Path) -> None:
    first = run_stage("toy", 1, Recipe(), INPUTS, Work())
    with again(True), pytest.raises(KeyboardInterrupt):
        run_stage("toy", 1, Recipe(), INPUTS, interrupted)
    plain = run_stage("toy", 1, Recipe(), INPUTS, Work())
    assert plain.reused and plain.uri == first.uri


@pytest.mark.parametrize("reason", ["other code", "what is there cannot be gone on from"])
def test_an_interrupted_again_is_begun_anew_where_going_on_makes_no_sense(
    runs: Path, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    def stuck(attempt: Attempt) -> StageResult:
        raise identity.CannotResume("another order of images; begin anew with --again")

    work = Work()
    with again(True):
        error = KeyboardInterrupt if reason == "other code" else identity.CannotResume
        with pytest.raises(error):
            run_stage("toy", 1, Recipe(), INPUTS, interrupted if reason == "other code" else stuck)
        if reason == "other code":
            monkeypatch.setattr(identity, "code_fingerprint", lambda: "0123456789abcdef-commit")
        run_stage("toy", 1, Recipe(), INPUTS, work)
    assert (work.attempts[0].number, work.attempts[0].first) == (2, 2)


def test_the_again_of_a_workflow_takes_what_it_has_made_itself(runs: Path) -> None:
    work = Work()
    run_stage("toy", 1, Recipe(), INPUTS, work)
    with again(True, "token 1"):
        assert not run_stage("toy", 1, Recipe(), INPUTS, work).reused
        assert run_stage("toy", 1, Recipe(), INPUTS, work).reused
    with again(True, "token 2"):
        assert not run_stage("toy", 1, Recipe(), INPUTS, work).reused


def test_a_result_whose_output_is_gone_is_made_again(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work()

    def write(attempt: Attempt) -> StageResult:
        uri = store.join(attempt.uri, "out")
        store.write(uri, b"x")
        return replace(work(attempt), uri=uri)

    def made() -> StageResult:
        return run_stage("toy", 1, Recipe(), INPUTS, write, missing=identity.missing_object)

    first = made()
    assert made().reused
    store.delete(first.uri)
    second = made()
    assert not second.reused and second.uri != first.uri
    assert f"finished before, but its output {first.uri} is gone; it is made again" in capsys.readouterr().out
    assert made() == replace(second, reused=True)


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


def test_a_result_is_never_written_over_that_of_a_later_attempt(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease is lost, and the other attempt ends, between the last look at the lease and the write."""
    check = identity.Lease.check
    other = Work()

    def late(held: identity.Lease) -> None:
        check(held)
        monkeypatch.setattr(identity.Lease, "check", check)
        record = store.read_json(held.uri)
        store.write_json(held.uri, {**record, "expires": 0.0})
        run_stage("toy", 1, Recipe(), INPUTS, other)

    monkeypatch.setattr(identity.Lease, "check", late)
    with pytest.raises(LeaseLost, match="attempt 2 has written its result; attempt 1 writes nothing more"):
        run_stage("toy", 1, Recipe(), INPUTS, Work())
    assert other.attempts[0].number == 2
    result = find_result("toy", other.attempts[0].digest)
    assert result is not None and result.uri == other.attempts[0].uri


def test_the_holder_of_the_lease_writes_over_what_a_former_attempt_left_late(runs: Path) -> None:
    place = runs / "toy" / digest_of("toy", 1, Recipe(), INPUTS)

    def overtaken(attempt: Attempt) -> StageResult:
        result = Work()(attempt)
        store.write_json(str(place / "result.json"), {"attempt": 0, "result": {"stage": "toy"}})
        return result

    made = run_stage("toy", 1, Recipe(), INPUTS, overtaken)
    assert find_result("toy", made.digest) == replace(made, reused=True)


@pytest.mark.parametrize("alive", [True, False])
def test_a_lease_of_an_earlier_release_is_read(tmp_path: Path, alive: bool) -> None:
    """It names its holder by pid and psutil's start time in seconds."""
    import psutil

    uri = str(tmp_path / "lease.json")
    started = round(psutil.Process().create_time(), 2) - (0 if alive else 100)
    record = {"token": "t", "attempt": 3, "host": socket.gethostname(), "pid": os.getpid(), "started": started}
    store.write_json(uri, {**record, "expires": time.time() + 100})
    if alive:
        with pytest.raises(Held, match="attempt 3"), identity.lease(uri, "toy"):
            pass
    else:
        with identity.lease(uri, "toy") as held:
            assert held.attempt == 4


def test_a_clock_that_is_set_does_not_make_a_holder_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    uri = str(tmp_path / "lease.json")
    with identity.lease(uri, "toy"):
        # What a step of the wall clock does to psutil.
        moved = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda process: moved(process) + 3600)
        with pytest.raises(Held), identity.lease(uri, "toy"):
            pass


def test_a_lease_is_renewed_while_it_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.lease.RENEW_SECONDS", 0.05)
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


@pytest.mark.parametrize("data", [b"{}", b"[]", b"null", b'{"token": "x"}'])
def test_a_lease_object_that_is_none_is_named(data: bytes, tmp_path: Path) -> None:
    uri = str(tmp_path / "lease.json")
    store.write(uri, data)
    with pytest.raises(store.StoreError, match=r"lease.json is no lease; if no other process writes there, delete it"):
        identity.lease(uri, "toy").__enter__()


def test_a_lease_whose_release_was_not_written_is_taken_again_by_the_same_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "lease.json")
    with monkeypatch.context() as patch, identity.lease(uri, "toy"):
        with pytest.raises(Held), identity.lease(uri, "toy"):
            pass

        def full(*_: object, **__: object) -> str:
            raise store.StoreError("no space left")

        patch.setattr("pipelines.lease.store.write_json", full)
    monkeypatch.undo()
    with identity.lease(uri, "toy") as held:
        assert held.attempt == 2
