"""`vit gc`: what it takes and, above all, what it leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines import identity, store
from pipelines.config import RecipeError
from pipelines.garbage import collect, main, parse_age, sweep
from pipelines.runs import find, lines

FINISHED, SOURCE, LEFT, YOUNG = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)
NOW = 1_000_000.0


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT_ROOT", str(tmp_path / "root"))


def put(digest: str, name: str, value: Any) -> str:
    uri = store.join(identity.runs(), "pretrain", digest, name)
    store.write_json(uri, value)
    return uri


def finish(digest: str, age: float, **inputs: str) -> None:
    weights = put(digest, "attempts/2/weights.safetensors", "weights")
    for name in ("attempts/1/checkpoints/000000010/manifest.json", "attempts/1/checkpoints/000000010/state.json"):
        put(digest, name, {})
    put(digest, "attempts/1/initial.safetensors", "copy")
    put(digest, "attempts/2/outcome.json", {})
    put(digest, "lease.json", {"expires": 0.0, "attempt": 2, "token": "", "host": "h", "pid": 1, "started": 0.0})
    record = {"started": NOW - age - 10, "seconds": 10.0, "identity": {"inputs": inputs}, "recipe": {}}
    put(digest, "result.json", {**record, "result": {"uri": weights, "metrics": {}}})


def leave(digest: str, age: float) -> None:
    put(digest, "lease.json", {"expires": 0.0, "attempt": 3, "token": "", "host": "h", "pid": 1, "started": 0.0})
    put(digest, "attempts/3/progress.json", {"step": 5, "time": NOW - age})
    put(digest, "attempts/3/checkpoints/000000005/manifest.json", {})


def kinds(
    older_than: float = 100.0, results: bool = False, named: set[str] | None = None
) -> dict[str, tuple[str, set[str]]]:
    found = collect(find(), named or set(), older_than, results, now=NOW)
    return {one.run.digest: (one.kind, {uri.removeprefix(one.run.place + "/") for uri in one.uris}) for one in found}


def test_of_a_finished_run_only_what_its_result_does_not_need_is_spent() -> None:
    finish(FINISHED, age=200)
    finish(YOUNG, age=50)
    spent = {
        "attempts/1/checkpoints/000000010/manifest.json",
        "attempts/1/checkpoints/000000010/state.json",
        "attempts/1/initial.safetensors",
    }
    assert kinds() == {FINISHED: ("spent", spent)}


def test_an_abandoned_run_keeps_its_attempt_number_alone() -> None:
    leave(LEFT, age=200)
    leave(YOUNG, age=50)
    (digest,) = kinds()
    assert digest == LEFT and kinds()[LEFT][0] == "abandoned" and "lease.json" not in kinds()[LEFT][1]


def test_what_a_version_or_another_result_names_is_no_result_to_free() -> None:
    finish(SOURCE, age=300)
    finish(FINISHED, age=200, weights=SOURCE)
    found = kinds(results=True)
    assert found[SOURCE][0] == "spent" and found[FINISHED][0] == "unnamed"
    assert "result.json" in found[FINISHED][1] and "attempts/2/weights.safetensors" in found[FINISHED][1]
    assert kinds(results=True, named={FINISHED})[FINISHED][0] == "spent"


def test_a_running_run_and_one_of_unknown_age_stay() -> None:
    leave(LEFT, age=200)
    put(YOUNG, "attempts/1/checkpoints/000000005/manifest.json", {})
    with identity.lease(store.join(identity.runs(), "pretrain", LEFT, "lease.json"), "pretrain"):
        assert kinds() == {}


def test_an_interrupted_again_is_as_young_as_its_last_step() -> None:
    finish(FINISHED, age=200)
    put(FINISHED, "attempts/3/progress.json", {"step": 90_000, "time": NOW - 50})
    put(FINISHED, "attempts/3/checkpoints/000090000/manifest.json", {})
    assert kinds() == {}
    assert kinds(older_than=40.0)[FINISHED][0] == "spent"


def test_what_a_version_names_stays_while_its_result_is_made_again() -> None:
    """Deleting the result object makes a stage run again; the version's weights lie in the attempt before."""
    finish(FINISHED, age=200)
    put(FINISHED, "attempts/2/progress.json", {"step": 5, "time": NOW - 200})
    store.delete(store.join(identity.runs(), "pretrain", FINISHED, "result.json"))
    assert kinds()[FINISHED][0] == "abandoned"
    assert kinds(named={FINISHED}) == kinds(named={FINISHED}, results=True) == {}


@pytest.mark.parametrize("text", ["[1]", "null", "{", '{"started": "x", "result": {}}', '{"started": 1, "result": 2}'])
def test_a_result_that_is_none_is_listed_as_damaged_and_nothing_of_it_is_freed(text: str) -> None:
    finish(FINISHED, age=200)
    finish(SOURCE, age=200)
    store.write(store.join(identity.runs(), "pretrain", FINISHED, "result.json"), text.encode())
    assert set(kinds(results=True)) == {SOURCE}
    damaged, whole = lines(find())
    assert "damaged" in damaged and "result.json" in damaged and "finished" in whole


def test_what_a_run_under_way_takes_from_is_no_result_to_free() -> None:
    finish(SOURCE, age=300)
    leave(LEFT, age=50)
    record = {"expires": 0.0, "attempt": 3, "token": "", "host": "h", "pid": 1, "started": 0.0}
    put(LEFT, "lease.json", {**record, "note": {"sources": [SOURCE]}})
    assert kinds(results=True)[SOURCE][0] == "spent"
    assert kinds(results=True, older_than=40.0)[SOURCE][0] == "unnamed", "nobody is at it, and it is as old as that"


def test_what_is_swept_is_gone_and_the_rest_stands() -> None:
    finish(FINISHED, age=200)
    (one,) = collect(find(), set(), 100.0, False, now=NOW)
    sweep(one)
    assert kinds() == {}
    left = {item.uri.rpartition(FINISHED + "/")[2] for item in store.list_objects(identity.runs())}
    assert left == {"lease.json", "result.json", "attempts/2/outcome.json", "attempts/2/weights.safetensors"}


def test_a_run_that_has_ended_meanwhile_is_left_alone() -> None:
    leave(LEFT, age=200)
    (one,) = collect(find(), set(), 100.0, False, now=NOW)
    finish(LEFT, age=0)
    sweep(one)
    assert store.exists(store.join(identity.runs(), "pretrain", LEFT, "attempts/3/progress.json"))


def test_a_dry_run_deletes_nothing_and_says_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    finish(FINISHED, age=200)  # In January 1970.
    before = [item.uri for item in store.list_objects(identity.runs())]
    assert main(["--older-than", "1h", "--dry-run"]) == 0
    assert "would free" in capsys.readouterr().out
    assert [item.uri for item in store.list_objects(identity.runs())] == before


@pytest.mark.stack
@pytest.mark.timeout(300)
def test_with_a_real_registry_what_a_version_an_alias_or_a_lease_names_survives(
    stack: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As far back as January 1970: SOURCE by the tag of a version, another by being it, LEFT by its lease."""
    from pipelines.tracking import registry
    from pipelines.tracking.client import connect
    from pipelines.tracking.run import track
    from tests.pipelines.tracking.toys import ToyCorpus, ToyRecipe, attempt, digest_named, own_root, save_toy

    own_root(monkeypatch)
    tuned, older = digest_named("gc tuned"), digest_named("gc older")
    name = f"gc-{tuned[:8]}"
    for digest in (older, tuned):
        own = attempt(digest, stage="pretrain")
        with track(own, ToyRecipe(), corpus=ToyCorpus()) as run:
            reference = registry.register_version(
                run,
                name=name,
                weights=save_toy(tmp_path / f"{digest}.safetensors"),
                corpus=ToyCorpus(),
                metrics={},
                tags={"vit.pretrain_digest": SOURCE} if digest == tuned else {},
                attempt=own,
            )
    connect().set_registered_model_alias(name, "champion", reference.rpartition("/")[2])
    for digest in (SOURCE, FINISHED, tuned, older):
        finish(digest, age=200)
    leave(LEFT, age=200)
    with identity.lease(store.join(identity.runs(), "pretrain", LEFT, "lease.json"), "pretrain"):
        assert main(["--older-than", "1h", "--results"]) == 0
    assert "unnamed" in capsys.readouterr().out
    standing = {run.digest for run in find("pretrain") if run.result() is not None}
    assert standing == {SOURCE, tuned, older}
    assert store.exists(store.join(identity.runs(), "pretrain", LEFT, "attempts/3/checkpoints/000000005/manifest.json"))
    # Whoever deletes a version, alias and all, gives its run free; the runs of other versions stay.
    connect().delete_model_version(name, reference.rpartition("/")[2])
    assert main(["--older-than", "1h", "--results"]) == 0
    assert {run.digest for run in find("pretrain") if run.result() is not None} == {older}


@pytest.mark.parametrize(
    ("text", "seconds"), [("36h", 129_600), ("30d", 2_592_000), ("0.5d", 43_200), ("2w", 1_209_600)]
)
def test_ages(text: str, seconds: float) -> None:
    assert parse_age(text) == seconds


@pytest.mark.parametrize("words", [[], ["--older-than"], ["--older-than", "soon"], ["--all"]])
def test_a_wrong_command_is_refused(words: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"vit gc takes|is no age"):
        main(words)
