"""Dagster definitions generated from a workflow file: an asset per step, a check on each promotion, a job, a schedule.

Nothing is decided here: what is finished, and what runs again, is the identity law's business (pipelines/identity.py).
"""
# No `from __future__ import annotations`: Dagster looks at the context parameter's annotation itself.

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import dagster

from pipelines.progress import say
from pipelines.workflow.again import again_of
from pipelines.workflow.home import IN_PROCESS_FILE, dagster_home
from pipelines.workflow.liveness import PROCESS_TAG, WORKFLOW_TAG, end_dead_runs, process_tag, unfinished_runs
from pipelines.workflow.runner import Outcome, StepFailed, root_error, run_step
from pipelines.workflow.spec import Workflow

__all__ = ["definitions", "gate", "job_name", "run_in_process"]

RETRIES = 1  # A stage repairs what it can by itself; this is for a stack that was restarted under it.
RETRY_SECONDS = 15.0
URI, DIGEST = "uri", "digest"


@dataclass
class Hooks:
    """What one process shares between the steps of its runs."""

    prepare: Callable[[], None] = lambda: None
    observe: Callable[[Outcome], None] = lambda outcome: None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)


def job_name(workflow: Workflow) -> str:
    return f"{workflow.name}_job"


def definitions(workflow: Workflow, prepare: Callable[[], None] = lambda: None) -> dagster.Definitions:
    """What Dagster's daemon and web server load. `prepare` runs before each step; it heals the embedded stack."""
    assets = _assets(workflow, Hooks(prepare=prepare))
    job = dagster.define_asset_job(
        job_name(workflow),
        selection=assets,
        executor_def=dagster.in_process_executor,
        tags={WORKFLOW_TAG: workflow.name},
    )
    return dagster.Definitions(assets=assets, jobs=[job], schedules=list(_schedules(workflow)))


def run_in_process(workflow: Workflow, observe: Callable[[Outcome], None] = lambda _: None) -> dict[str, Outcome]:
    """All steps in this process, with the history kept in the state folder; stops at the first step that fails."""
    with again_of(workflow):
        return _materialize(workflow, Hooks(observe=observe))


def _materialize(workflow: Workflow, hooks: Hooks) -> dict[str, Outcome]:
    with dagster.DagsterInstance.from_config(str(dagster_home()), IN_PROCESS_FILE) as instance:
        for reason in end_dead_runs(instance, workflow.name):
            say(f"{workflow.name}: {reason}")
        try:
            done = dagster.materialize(
                _assets(workflow, hooks),
                instance=instance,
                run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
                raise_on_error=False,
                tags={WORKFLOW_TAG: workflow.name, **process_tag()},
            )
        except dagster.DagsterExecutionInterruptedError:
            raise KeyboardInterrupt from None
    if hooks.errors:
        step, error = next(iter(hooks.errors.items()))
        _raise(step, error)
    if not done.success:
        failures = [event.message for event in done.all_events if event.is_failure]
        raise RuntimeError(f"Dagster could not run {workflow.name}: {'; '.join(failures) or 'no reason given'}")
    return {name: hooks.outcomes[name] for name in workflow.steps}


def gate(outcome: Outcome) -> tuple[bool, str]:
    """Whether the version that a promote step was given is champion now, and what was said about it."""
    details = outcome.result.details
    return bool(details["passed"]), str(details["reason"])


def _assets(workflow: Workflow, hooks: Hooks) -> list[dagster.AssetsDefinition]:
    return [_asset(workflow, name, place, hooks) for place, name in enumerate(workflow.order())]


def _asset(workflow: Workflow, name: str, place: int, hooks: Hooks) -> dagster.AssetsDefinition:
    step = workflow.steps[name]
    key = [workflow.name, name]
    checks = [dagster.AssetCheckSpec("gate", asset=key, description="champion now")] if step.stage == "promote" else []

    @dagster.asset(
        key=key,
        deps=[[workflow.name, source] for source in dict.fromkeys(step.inputs.values())],
        group_name=workflow.name,
        kinds={step.stage},
        op_tags={"dagster/priority": str(-place)},  # Where the graph leaves a choice: the order of the file.
        description=f"`vit {step.stage} {step.recipe}`",
        retry_policy=dagster.RetryPolicy(max_retries=RETRIES, delay=RETRY_SECONDS),
        check_specs=checks,
    )
    def compute(context: dagster.AssetExecutionContext) -> Iterator[Any]:
        _sign(context)
        if hooks.errors:  # Dagster would go on with what does not depend on it; an interrupt means all.
            raise dagster.Failure(f"not run: step {next(iter(hooks.errors))} ended the workflow", allow_retries=False)
        hooks.prepare()
        uris = {source: _uri(context, workflow, source, hooks) for source in step.inputs.values()}
        try:
            with _interrupts():
                outcome = run_step(workflow, name, uris)
        except (Exception, KeyboardInterrupt) as error:
            if _may_pass(error) and context.retry_number < RETRIES:
                raise  # No end yet: what is ready goes on while this step waits for its next try.
            hooks.errors[name] = error
            raise dagster.Failure(f"{name}: {root_error(error)!s}", allow_retries=False) from error
        hooks.outcomes[name] = outcome
        hooks.observe(outcome)
        results = []
        if checks:
            passed, reason = gate(outcome)
            results = [dagster.AssetCheckResult(passed=passed, check_name="gate", metadata={"reason": reason})]
        yield dagster.MaterializeResult(asset_key=key, metadata=_metadata(outcome), check_results=results)

    return compute


def _sign(context: dagster.AssetExecutionContext) -> None:
    """Put this process's name to the run, so that its death is noticed."""
    mine = process_tag()
    if context.run.tags.get(PROCESS_TAG) != mine[PROCESS_TAG]:
        context.instance.add_run_tags(context.run.run_id, mine)


def _uri(context: dagster.AssetExecutionContext, workflow: Workflow, source: str, hooks: Hooks) -> str:
    """What an upstream step produced: in this run, or, when only a part was selected in the UI, the last time."""
    if (
        source in hooks.outcomes
        and f"{workflow.name}__{source}" in context.op_execution_context.job_def.graph.node_dict
    ):
        return hooks.outcomes[source].result.uri
    event = context.instance.get_latest_materialization_event(dagster.AssetKey([workflow.name, source]))
    found = event.asset_materialization.metadata.get(URI) if event and event.asset_materialization else None
    if found is None:
        raise ValueError(f"step {source} has produced nothing yet; run it first, or the whole workflow")
    return str(found.value)


def _metadata(outcome: Outcome) -> dict[str, Any]:
    result = outcome.result
    return {
        URI: result.uri,
        DIGEST: result.digest,
        "mlflow_run": result.run_id or "",
        "reused": result.reused,
        "seconds": round(outcome.seconds, 3),
        **{f"metrics/{name}": float(value) for name, value in result.metrics.items()},
    }


def _may_pass(error: BaseException) -> bool:
    """Whether the same step may succeed a little later: the network or a service failed, not the recipe or the data."""
    from pipelines.store import NotFound, StoreError

    root = root_error(error)
    if isinstance(root, StoreError):
        return not isinstance(root, NotFound)
    return isinstance(root, ConnectionError | TimeoutError)


def _raise(step: str, error: BaseException) -> None:
    from pipelines.identity import Held

    if isinstance(error, Held | KeyboardInterrupt):
        raise error
    raise StepFailed(step, error) from error


def _schedules(workflow: Workflow) -> Iterator[dagster.ScheduleDefinition]:
    if workflow.schedule is None:
        return

    @dagster.schedule(
        name=workflow.name,
        job_name=job_name(workflow),
        cron_schedule=workflow.schedule.cron,
        execution_timezone=workflow.schedule.timezone,
        default_status=dagster.DefaultScheduleStatus.RUNNING,
    )
    def tick(context: dagster.ScheduleEvaluationContext) -> Any:
        """One run at a time: a tick during a run is skipped, and the tick after it finds what has changed."""
        for reason in end_dead_runs(context.instance, workflow.name):
            context.log.warning(reason)
        if going := unfinished_runs(context.instance, workflow.name):
            return dagster.SkipReason(f"run {going[0].run_id} is still going")
        return dagster.RunRequest()

    yield tick


@contextlib.contextmanager
def _interrupts() -> Iterator[None]:
    """Ctrl-C reaches the stage as KeyboardInterrupt, which it knows how to end on; Dagster has its own exception."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
