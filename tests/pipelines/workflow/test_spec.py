"""A workflow file says everything that is wrong with it at once, before anything starts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.config import RecipeError
from pipelines.workflow.spec import Schedule, Step, Workflow, load_workflow, packaged_workflows

Write = Callable[[str, str], str]


def workflow_of(edges: dict[str, list[str]]) -> Workflow:
    steps = {
        name: Step(stage="shard", recipe="x", inputs={f"field{n}": source for n, source in enumerate(sources)})
        for name, sources in edges.items()
    }
    return Workflow(name="w", steps=steps)


@given(st.lists(st.lists(st.integers(0, 30), max_size=3), min_size=1, max_size=12), st.randoms())
def test_every_step_comes_after_the_steps_it_takes_from(sources: list[list[int]], random: object) -> None:
    edges = {f"s{n}": [f"s{source % n}" for source in taken] if n else [] for n, taken in enumerate(sources)}
    names = list(edges)
    random.shuffle(names)  # type: ignore[attr-defined]
    order = workflow_of({name: edges[name] for name in names}).order()
    assert sorted(order) == sorted(edges)
    assert all(order.index(source) < order.index(name) for name, taken in edges.items() for source in taken)


def test_steps_without_ties_keep_the_order_of_the_file() -> None:
    assert workflow_of({"b": [], "a": [], "c": ["a"]}).order() == ["b", "a", "c"]


def test_a_circle_is_named() -> None:
    with pytest.raises(ValueError, match=r"each waits for the other: .*a.*b"):
        workflow_of({"a": ["b"], "b": ["a"]})


def test_all_problems_of_the_shape_are_in_one_error(write: Write) -> None:
    path = write(
        "w.yaml",
        "steps:\n  one: {stage: bre, recipe: r.yaml, inputs: {water: tow}}\n  two: {stage: brew, recipe: r.yaml}\n",
    )
    with pytest.raises(RecipeError) as caught:
        load_workflow(path)
    assert "unknown stage 'bre'; did you mean 'brew'?" in str(caught.value)
    assert "no step 'tow'; did you mean 'two'?" in str(caught.value)


def test_every_recipe_is_read_before_anything_starts(write: Write) -> None:
    write("short.yaml", "minutes: 0\n")
    write("good.yaml", "leaf: mint\n")
    path = write(
        "w.yaml",
        """
        steps:
          gone: {stage: brew, recipe: gone.yaml}
          short: {stage: brew, recipe: short.yaml}
          typo: {stage: brew, recipe: good.yaml, inputs: {watr: gone}}
          wrong: {stage: brew, recipe: good.yaml, set: {minutes: long}}
        """,
    )
    with pytest.raises(RecipeError) as caught:
        load_workflow(path)
    text = str(caught.value)
    assert "4 problem(s)" in text
    assert "steps.gone: recipe 'gone.yaml' is neither a file nor a packaged recipe" in text
    assert "tea needs at least 1" in text
    assert "watr: unknown key; did you mean 'water'?" in text
    assert "steps.wrong" in text and "'long'" in text


def test_an_unknown_key_of_a_step_names_the_nearest(write: Write) -> None:
    with pytest.raises(RecipeError, match=r"recipee: unknown key; did you mean 'recipe'\?"):
        load_workflow(write("w.yaml", "steps: {a: {stage: brew, recipe: r, recipee: r}}"))


def test_a_field_is_filled_once(write: Write) -> None:
    write("r.yaml", "")
    path = write(
        "w.yaml",
        "steps:\n  a: {stage: brew, recipe: r.yaml}\n"
        "  b: {stage: brew, recipe: r.yaml, inputs: {water: a}, set: {water: x}}\n",
    )
    with pytest.raises(RecipeError, match="'water' stands in both inputs and set"):
        load_workflow(path)


def test_values_from_the_command_line_win_over_the_file(write: Write) -> None:
    write("r.yaml", "minutes: 3\n")
    path = write("w.yaml", "steps: {a: {stage: brew, recipe: r.yaml, set: {minutes: 5}}}")
    assert load_workflow(path).recipe("a", {}).minutes == 5
    assert load_workflow(path, {"a": {"minutes": 7}}).recipe("a", {}).minutes == 7
    with pytest.raises(RecipeError, match="no step 'b'"):
        load_workflow(path, {"b": {"minutes": 7}})


def test_a_recipe_beside_the_workflow_file_is_found_from_anywhere(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("r.yaml", "minutes: 3\n")
    path = write("w.yaml", "steps: {a: {stage: brew, recipe: r.yaml}}")
    monkeypatch.chdir("/")
    assert load_workflow(path).recipe("a", {}).minutes == 3


def test_a_file_without_a_name_takes_its_own(write: Write) -> None:
    write("r.yaml", "")
    assert load_workflow(write("my-flow.yaml", "steps: {a: {stage: brew, recipe: r.yaml}}")).name == "my_flow"


@pytest.mark.parametrize("cron", ["* * * * *", "0 3 * * *", "*/5 1-4,8 1 jan,Mar mon-fri", "0 0 1 1 7"])
def test_a_cron_line_is_taken(cron: str) -> None:
    assert Schedule(cron=cron).cron == cron


@pytest.mark.parametrize("cron", ["", "* * * *", "60 * * * *", "x * * * *", "*/0 * * * *", "1-2-3 * * * *", "@daily"])
def test_what_is_no_cron_line_is_refused_with_an_example(cron: str) -> None:
    with pytest.raises(ValueError, match="every night at three"):
        Schedule(cron=cron)


def test_an_unknown_timezone_is_refused() -> None:
    with pytest.raises(ValueError, match="Mars/Olympus"):
        Schedule(cron="* * * * *", timezone="Mars/Olympus")


@pytest.mark.parametrize("name", packaged_workflows())
def test_every_packaged_workflow_loads(name: str) -> None:
    assert load_workflow(name).steps
