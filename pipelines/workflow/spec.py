"""A workflow file: steps that name a stage, a recipe and whose output feeds which field. It knows nothing of Dagster.

`load_workflow` checks everything that can be checked before anything starts, and reports all of it at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal

from pipelines.config import RecipeError, Strict, find_recipe, from_dict, load_recipe, packaged_recipes, read_yaml
from pipelines.workflow.stages import STAGES, check, nearest, recipe_class

__all__ = ["Schedule", "Step", "Workflow", "find_workflow", "load_workflow", "merged", "packaged_workflows"]

# Limits of the five cron fields: minute, hour, day of month, month, day of week.
CRON_LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
CRON_WORDS = dict(zip(["sun", "mon", "tue", "wed", "thu", "fri", "sat"], "0123456", strict=True)) | {
    month: str(number)
    for number, month in enumerate(
        ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"], 1
    )
}
StepValues = Mapping[str, Mapping[str, Any]]  # {step: {dotted recipe field: value}}
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schedule(Strict):
    """When a workflow runs by the clock."""

    cron: str  # Five fields: minute, hour, day of month, month, day of week.
    timezone: str = "UTC"  # IANA name, such as Europe/Paris.

    def __post_init__(self) -> None:
        fields = self.cron.split()
        if len(fields) != len(CRON_LIMITS) or not all(map(_cron_field, fields, CRON_LIMITS)):
            raise ValueError(f"cron={self.cron!r} is not five cron fields; every night at three is '0 3 * * *'")
        from zoneinfo import ZoneInfo

        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"timezone={self.timezone!r} is unknown; take an IANA name such as Europe/Paris") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class Step(Strict):
    """One stage run: a recipe, and the fields that other steps or this file fill in."""

    stage: str  # A stage by name, such as pretrain.
    recipe: str  # A path beside the workflow file, or the name of a packaged recipe.
    inputs: dict[str, str] = field(default_factory=dict)  # Recipe field -> the step whose output URI it takes.
    set: dict[str, Any] = field(default_factory=dict)  # Dotted recipe field -> value, over the recipe file.
    where: Literal["here", "job"] = "here"  # "job": a Ray job, to which a second submission attaches.


@dataclass(frozen=True, kw_only=True, slots=True)
class Workflow(Strict):
    """Steps by name, and optionally when to run them."""

    steps: dict[str, Step]
    name: str  # Of its schedule and its Dagster job; a file without one takes the file's name.
    schedule: Schedule | None = None  # A cron string will do.

    def __post_init__(self) -> None:
        problems = list(_shape_problems(self))
        if problems:
            raise ValueError("\n".join(problems))

    def order(self) -> list[str]:
        """Step names, each after the steps it takes from; in file order where that leaves a choice."""
        taken = {
            name: {source for source in step.inputs.values() if source in self.steps}
            for name, step in self.steps.items()
        }
        sorter = TopologicalSorter(taken)
        sorter.prepare()
        position = {name: place for place, name in enumerate(self.steps)}
        ready: list[str] = []
        done: list[str] = []
        while sorter.is_active():
            ready = sorted([*ready, *sorter.get_ready()], key=position.__getitem__)
            done.append(ready.pop(0))
            sorter.done(done[-1])
        return done

    def recipe(self, name: str, uris: Mapping[str, str]) -> Any:
        """The step's recipe with its inputs filled in; `uris` maps step names to what they produced."""
        step = self.steps[name]
        values = {**step.set, **{key: uris[source] for key, source in step.inputs.items()}}
        return load_recipe(recipe_class(step.stage), step.recipe, values)

    def with_values(self, values: StepValues) -> Workflow:
        """The same workflow with more `set` entries: {step: {dotted field: value}}."""
        for name in values:
            if name not in self.steps:
                raise RecipeError(f"workflow {self.name}: no step {name!r}{nearest(name, self.steps)}")
        joined = merged({name: step.set for name, step in self.steps.items()}, values)
        steps = {name: replace(step, set=dict(joined[name])) for name, step in self.steps.items()}
        return replace(self, steps=steps)

    def without(self, *names: str) -> Workflow:
        """The workflow without some steps; none of the others may take from them."""
        return replace(self, steps={name: step for name, step in self.steps.items() if name not in names})


def merged(values: StepValues, over: StepValues) -> dict[str, dict[str, Any]]:
    """Both, step by step; `over` wins."""
    return {name: {**values.get(name, {}), **over.get(name, {})} for name in {**values, **over}}


def packaged_workflows() -> list[str]:
    prefix = "workflows/"
    return [name.removeprefix(prefix) for name in packaged_recipes() if name.startswith(prefix)]


def find_workflow(name_or_path: str | Path) -> Path:
    """A path as it is, or a packaged workflow by its name ("demo" or "workflows/demo")."""
    name = str(name_or_path)
    if Path(name).is_file():
        return Path(name)
    if name.removeprefix("workflows/") in packaged_workflows():
        return find_recipe(f"workflows/{name.removeprefix('workflows/')}")
    raise RecipeError(
        f"workflow {name!r} is neither a file nor a packaged workflow{nearest(name, packaged_workflows())}"
    )


def load_workflow(name_or_path: str | Path, values: StepValues | None = None) -> Workflow:
    """Read and check a workflow file, and every recipe it names. Every problem is in the one error.

    `values` adds to the steps' `set` entries before the recipes are checked: {step: {dotted field: value}}.
    """
    path = find_workflow(name_or_path)
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise RecipeError(f"{path}: a workflow is a mapping with the key `steps`, got {type(given).__name__}")
    given.setdefault("name", re.sub(r"\W", "_", path.stem))
    if isinstance(given.get("schedule"), str):
        given["schedule"] = {"cron": given["schedule"]}
    workflow = from_dict(Workflow, given, str(path)).with_values(values or {})
    beside = {name: replace(step, recipe=_beside(path, step.recipe)) for name, step in workflow.steps.items()}
    workflow = replace(workflow, steps=beside)
    problems = list(_recipe_problems(workflow))
    if problems:
        raise RecipeError("\n".join([f"{path}: {len(problems)} problem(s)", *(f"  {line}" for line in problems)]))
    return workflow


def _beside(workflow_file: Path, recipe: str) -> str:
    """A recipe path is relative to its workflow file first, then to where the command runs."""
    beside = workflow_file.parent / recipe
    return str(beside.resolve()) if beside.is_file() else recipe


def _shape_problems(workflow: Workflow) -> Iterator[str]:
    if not workflow.steps:
        yield "steps: a workflow has at least one step"
    if not NAME.fullmatch(workflow.name):
        yield f"name={workflow.name!r}: letters, digits and _ only, a letter first"
    for name, step in workflow.steps.items():
        if not NAME.fullmatch(name):
            yield f"steps.{name}: a step name has letters, digits and _ only, a letter first"
        if step.stage not in STAGES:
            yield f"steps.{name}.stage: unknown stage {step.stage!r}{nearest(step.stage, STAGES)}"
        for key, source in step.inputs.items():
            if source not in workflow.steps:
                yield f"steps.{name}.inputs.{key}: no step {source!r}{nearest(source, workflow.steps)}"
            if key in step.set:
                yield f"steps.{name}: {key!r} stands in both inputs and set; keep one"
    try:
        workflow.order()
    except CycleError as error:
        yield f"steps: each waits for the other: {' -> '.join(reversed(error.args[1]))}; drop one of these inputs"


def _recipe_problems(workflow: Workflow) -> Iterator[str]:
    """Load each recipe with a stand-in for every input: finds unknown fields, wrong values and missing files."""
    stand_ins = {name: f"s3://output/of/{name}" for name in workflow.steps}
    for name in workflow.steps:
        try:
            check(workflow.steps[name].stage, workflow.recipe(name, stand_ins))
        except RecipeError as error:
            yield f"steps.{name}: " + "\n  ".join(str(error).splitlines())


def _cron_field(text: str, limits: tuple[int, int]) -> bool:
    low, high = limits
    for part in text.lower().split(","):
        span, _, every = part.partition("/")
        if "/" in part and not (every.isdigit() and int(every) > 0):
            return False
        if span == "*":
            continue
        ends = [CRON_WORDS.get(end, end) for end in span.split("-")]
        if not 1 <= len(ends) <= 2 or not all(end.isdigit() and low <= int(end) <= high for end in ends):
            return False
    return True
