"""Plainly or through Dagster, a workflow gives the same results, reuses what is finished and resumes what is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines import store
from pipelines.identity import Held, lease, runs
from pipelines.workflow.again import again
from pipelines.workflow.home import state_folder
from pipelines.workflow.runner import NotRun, Outcome, StepFailed, run_plain
from pipelines.workflow.spec import Workflow, load_workflow
from tests.pipelines.workflow import brew

Run = Callable[[Workflow, Callable[[Outcome], None]], dict[str, Outcome]]

TWO_CUPS = """
steps:
  second: {stage: brew, recipe: r.yaml, inputs: {water: first}}
  first: {stage: brew, recipe: r.yaml, set: {minutes: 7}}
"""


@pytest.fixture(params=["plain", "dagster"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "plain":
        return run_plain
    from pipelines.workflow.assets import run_in_process

    return run_in_process


@pytest.fixture
def two_cups(write: Callable[[str, str], str], house: Path) -> Workflow:
    write("r.yaml", f"notes: {house / 'notes'}\n")
    return load_workflow(write("two.yaml", TWO_CUPS))


def brewed(house: Path) -> int:
    return len((house / "notes").read_text().splitlines())


def test_a_step_gets_what_the_step_before_it_made(run: Run, two_cups: Workflow, house: Path) -> None:
    seen: list[str] = []
    outcomes = run(two_cups, lambda outcome: seen.append(outcome.step))
    assert seen == ["first", "second"]
    assert b"'water'" in store.read(outcomes["second"].result.uri)
    assert not any(outcome.result.reused for outcome in outcomes.values())


def test_a_second_run_reuses_everything(run: Run, two_cups: Workflow, house: Path) -> None:
    first = run(two_cups, lambda _: None)
    second = run(two_cups, lambda _: None)
    assert all(outcome.result.reused for outcome in second.values())
    assert {name: done.result.digest for name, done in first.items()} == {
        name: done.result.digest for name, done in second.items()
    }
    assert brewed(house) == 2


def test_deleting_one_result_object_makes_exactly_that_step_run_again(
    run: Run, two_cups: Workflow, house: Path
) -> None:
    first = run(two_cups, lambda _: None)
    store.delete(store.join(runs(), "brew", first["first"].result.digest, "result.json"))
    second = run(two_cups, lambda _: None)
    assert {name: done.result.reused for name, done in second.items()} == {"first": False, "second": True}


def test_again_recomputes_every_step(run: Run, two_cups: Workflow, house: Path) -> None:
    run(two_cups, lambda _: None)
    with again(True):
        outcomes = run(two_cups, lambda _: None)
    assert not any(outcome.result.reused for outcome in outcomes.values())
    assert brewed(house) == 4


def test_an_interrupted_again_of_a_workflow_goes_on_where_it_was(
    run: Run, two_cups: Workflow, house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_cups = two_cups.with_values({"second": {"trouble": "interrupt once"}})
    run(two_cups, lambda _: None)
    (house / "notes.4").touch()
    with again(True), pytest.raises(KeyboardInterrupt):
        run(two_cups, lambda _: None)
    with again(True):
        resumed = run(two_cups, lambda _: None)
    assert {name: done.result.reused for name, done in resumed.items()} == {"first": True, "second": False}
    assert "two: goes on with the --again of" in capsys.readouterr().out
    assert brewed(house) == 5
    with again(True):
        anew = run(two_cups, lambda _: None)
    assert not any(done.result.reused for done in anew.values())
    assert not list(store.list_objects(store.join(store.root(), "workflows")))


def test_the_first_failing_step_is_named_with_its_own_error(run: Run, two_cups: Workflow, house: Path) -> None:
    seen: list[str] = []
    troubled = two_cups.with_values({"second": {"trouble": "value"}})
    with pytest.raises(StepFailed, match="step second: the kettle is cold; heat it first") as caught:
        run(troubled, lambda outcome: seen.append(outcome.step))
    assert isinstance(caught.value.__cause__, ValueError)
    assert seen == ["first"]
    assert run(two_cups, lambda _: None)["first"].result.reused


def test_nothing_more_is_started_after_a_failure(run: Run, write: Callable[[str, str], str]) -> None:
    """Also not what does not depend on it."""
    write("r.yaml", "")
    path = write(
        "w.yaml",
        "steps:\n  one: {stage: brew, recipe: r.yaml, set: {trouble: value}}\n"
        "  other: {stage: brew, recipe: r.yaml, set: {minutes: 9}}\n",
    )
    seen: list[str] = []
    with pytest.raises(StepFailed, match="step one"):
        run(load_workflow(path), lambda outcome: seen.append(outcome.step))
    assert not seen


def test_a_step_whose_gate_made_nothing_is_not_run_and_did_not_fail(
    run: Run, two_cups: Workflow, house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brew, "made_nothing", lambda uri: f"{uri.rsplit('/', 1)[1]} is empty", raising=False)
    with pytest.raises(StepFailed, match=r"step second: cup\.txt is empty") as caught:
        run(two_cups, lambda _: None)
    assert isinstance(caught.value.__cause__, NotRun)
    assert brewed(house) == 1


def test_an_interrupt_ends_the_run_as_an_interrupt(run: Run, two_cups: Workflow) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(two_cups.with_values({"first": {"trouble": "interrupt"}}), lambda _: None)
    assert run(two_cups, lambda _: None)


def test_a_step_that_another_process_is_at_is_not_run_twice(run: Run, two_cups: Workflow) -> None:
    first = run(two_cups, lambda _: None)["first"].result.digest
    place = store.join(runs(), "brew", first)
    store.delete(store.join(place, "result.json"))
    with lease(store.join(place, "lease.json"), "brew"), pytest.raises(Held, match="held by process"):
        run(two_cups, lambda _: None)


def test_while_a_step_waits_for_its_next_try_the_others_go_on(
    write: Callable[[str, str], str], house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.workflow import assets

    monkeypatch.setattr(assets, "RETRY_SECONDS", 1.0)
    notes = house / "notes"
    write("r.yaml", f"notes: {notes}\n")
    path = write(
        "w.yaml",
        "steps:\n  one: {stage: brew, recipe: r.yaml, set: {trouble: flaky}}\n"
        "  other: {stage: brew, recipe: r.yaml, set: {leaf: mint}}\n"
        "  last: {stage: brew, recipe: r.yaml, set: {leaf: sage}, inputs: {water: one}}\n",
    )
    outcomes = assets.run_in_process(load_workflow(path))
    assert list(outcomes) == ["one", "other", "last"]
    assert notes.read_text().split() == ["assam", "mint", "assam", "sage"]


def test_what_fails_in_every_try_ends_the_run_with_its_own_error(
    write: Callable[[str, str], str], house: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.workflow import assets

    monkeypatch.setattr(assets, "RETRY_SECONDS", 0.1)
    write("r.yaml", f"notes: {house / 'notes'}\n")
    path = write("w.yaml", "steps: {one: {stage: brew, recipe: r.yaml, set: {trouble: away}}}")
    with pytest.raises(StepFailed, match="step one: the store is away"):
        assets.run_in_process(load_workflow(path))
    assert brewed(house) == 1 + assets.RETRIES


def test_plain_and_dagster_agree_on_every_digest(two_cups: Workflow) -> None:
    from pipelines.workflow.assets import run_in_process

    plainly = run_plain(two_cups)
    assert {name: done.result.digest for name, done in run_in_process(two_cups).items()} == {
        name: done.result.digest for name, done in plainly.items()
    }


def test_a_state_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VIT_STATE", str(tmp_path / "file" / "state"))
    with pytest.raises(OSError, match=r"state folder .*/file/state cannot be written .*; set VIT_STATE"):
        state_folder()
