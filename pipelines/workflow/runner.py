"""Runs a workflow step after step without Dagster, and one step of it for whoever runs the rest."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.workflow.again import again, again_of
from pipelines.workflow.stages import made_nothing, stage_run

if TYPE_CHECKING:
    from pipelines.identity import StageResult
    from pipelines.workflow.spec import Workflow

__all__ = ["NotRun", "Outcome", "StepFailed", "again", "root_error", "run_plain", "run_stage_named", "run_step"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one step produced, and how long this run of it took."""

    step: str
    stage: str
    result: StageResult
    seconds: float


class StepFailed(RuntimeError):
    """A step of a workflow failed; its own error is the cause."""

    def __init__(self, step: str, error: BaseException) -> None:
        super().__init__(f"step {step}: {root_error(error)}")
        self.step = step


class NotRun(RuntimeError):
    """A step has nothing to work on: a gate upstream refused, which is an answer and no failure."""


def run_stage_named(stage: str, recipe: Any, *, step: str | None = None) -> Outcome:
    started = time.monotonic()
    result = stage_run(stage)(recipe)
    return Outcome(step or stage, stage, result, time.monotonic() - started)


def run_step(workflow: Workflow, name: str, uris: Mapping[str, str]) -> Outcome:
    """One step; `uris` maps the steps it takes from to what they produced. NotRun if that is nothing."""
    step = workflow.steps[name]
    for source in step.inputs.values():
        if nothing := made_nothing(workflow.steps[source].stage, uris[source]):
            raise NotRun(nothing)
    recipe = workflow.recipe(name, uris)
    if step.where == "job":
        from pipelines.workflow.submit import run_as_job

        started = time.monotonic()
        return Outcome(name, step.stage, run_as_job(step.stage, recipe), time.monotonic() - started)
    return run_stage_named(step.stage, recipe, step=name)


def run_plain(workflow: Workflow, observe: Callable[[Outcome], None] = lambda _: None) -> dict[str, Outcome]:
    """All steps in order, in this process; stops at the first that fails. `observe` hears of each finished step."""
    from pipelines.identity import Held

    outcomes: dict[str, Outcome] = {}
    with again_of(workflow):
        for name in workflow.order():
            try:
                outcomes[name] = run_step(workflow, name, {done: outcomes[done].result.uri for done in outcomes})
            except Held:
                raise
            except Exception as error:
                raise StepFailed(name, error) from error
            observe(outcomes[name])
    return outcomes


def root_error(error: BaseException) -> BaseException:
    """The error of our own code inside what Ray wraps around it: a task's cause, the first failed train worker."""
    for _ in range(10):
        failures = getattr(error, "worker_failures", None)
        inner = getattr(error, "cause", None)
        if isinstance(failures, Mapping) and failures:
            error = next(iter(failures.values()))
        elif isinstance(inner, BaseException):
            error = inner
        else:
            break
    return error
