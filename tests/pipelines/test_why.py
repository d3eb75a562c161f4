"""`vit why` names the state of a run and exactly the fields in which it differs from the nearest former one."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipelines import store, why
from pipelines.config import RecipeError
from pipelines.identity import lease, runs
from pipelines.workflow.planning import plan
from pipelines.workflow.runner import run_plain
from pipelines.workflow.spec import load_workflow
from tests.pipelines.workflow.brew import BrewRecipe, run
from tests.pipelines.workflow.conftest import house, write  # noqa: F401  fixtures

Write = Callable[[str, str], str]


def said(recipe: BrewRecipe) -> str:
    return "\n".join(why.describe("brew", plan("brew", recipe), recipe))


@pytest.mark.usefixtures("house")
def test_planning_does_no_work() -> None:
    planned = plan("brew", BrewRecipe(leaf="mint"))
    assert planned.state == "missing"
    assert not list(store.list_objects(runs()))
    assert planned.digest == run(BrewRecipe(leaf="mint")).digest
    assert plan("brew", BrewRecipe(leaf="mint")).state == "finished"


@pytest.mark.usefixtures("house")
def test_a_first_run_has_nothing_to_compare_with() -> None:
    assert "missing" in said(BrewRecipe()) and "no brew run has finished here before" in said(BrewRecipe())


@pytest.mark.usefixtures("house")
def test_the_nearest_former_run_is_the_one_with_the_fewest_differences() -> None:
    run(BrewRecipe(leaf="mint", minutes=2))
    run(BrewRecipe(leaf="mint", minutes=9))
    text = said(BrewRecipe(leaf="oolong", minutes=9))
    assert "leaf  mint -> oolong" in text
    assert "minutes" not in text


@pytest.mark.usefixtures("house")
def test_a_field_at_its_default_is_shown_with_its_value() -> None:
    run(BrewRecipe())
    assert "minutes  4 -> 5" in said(BrewRecipe(minutes=5))


@pytest.mark.usefixtures("house")
def test_fields_that_do_not_decide_are_no_difference() -> None:
    run(BrewRecipe(notes=""))
    assert "finished" in said(BrewRecipe(notes="elsewhere"))


@pytest.mark.usefixtures("house")
def test_an_input_is_compared_by_content() -> None:
    one, two = run(BrewRecipe(leaf="mint")), run(BrewRecipe(leaf="sage"))
    run(BrewRecipe(leaf="black", water=one.uri))
    text = said(BrewRecipe(leaf="black", water=two.uri))
    assert "inputs.water" in text and "leaf" not in text


@pytest.mark.usefixtures("house")
def test_a_run_that_is_going_on_names_its_holder_and_one_that_broke_off_says_so() -> None:
    recipe = BrewRecipe(leaf="mint")
    with lease(store.join(plan("brew", recipe).place, "lease.json"), "brew"):
        assert "running" in said(recipe) and "held by process" in said(recipe)
    assert "nobody is at it; the same command resumes" in said(recipe)


def test_a_workflow_says_what_waits_for_what(write: Write) -> None:  # noqa: F811
    write("r.yaml", "leaf: mint\n")
    path = write(
        "w.yaml",
        "steps:\n  first: {stage: brew, recipe: r.yaml}\n"
        "  second: {stage: brew, recipe: r.yaml, inputs: {water: first}}\n",
    )
    workflow = load_workflow(path)
    lines = "\n".join(why.why_workflow(workflow))
    assert "missing" in lines and "second  waits for first" in lines
    run_plain(workflow)
    assert "\n".join(why.why_workflow(workflow)).count("finished  ") == 2


def test_a_workflow_takes_the_flags_of_vit_run(write: Write, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    write("r.yaml", "leaf: mint\n")
    path = write("w.yaml", "steps: {first: {stage: brew, recipe: r.yaml}}")
    run_plain(load_workflow(path))
    assert why.main([path, "--first.minutes", "9"]) == 0
    assert "minutes  4 -> 9" in capsys.readouterr().out
    assert why.main([path, "--first.minutes=4"]) == 0
    assert "finished" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="no step 'frist'; did you mean 'first'"):
        why.main([path, "--frist.minutes", "9"])
    with pytest.raises(RecipeError, match=r"flags of the form --STEP\.field VALUE"):
        why.main([path, "--first", "9"])


def test_the_stage_of_a_recipe_is_the_one_that_takes_it(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(why, "STAGES", {"brew": ""})
    assert why.stage_of(write("r.yaml", "leaf: mint\n")) == "brew"
    with pytest.raises(RecipeError, match=r"fits no stage's recipe:\n  brew: leav: unknown key; did you mean 'leaf'"):
        why.stage_of(write("bad.yaml", "leav: mint\n"))
