"""Which run a recipe names, and where that run stands, without doing any of its work."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pipelines import store
from pipelines.identity import PLAN_ONLY, Planned, StageResult, find_result, holder_of, runs
from pipelines.workflow.stages import stage_run

__all__ = ["Plan", "plan"]

State = Literal["finished", "lost", "running", "unfinished", "missing"]


@dataclass(frozen=True, slots=True)
class Plan:
    """The run that `vit STAGE RECIPE` would do or return now."""

    stage: str
    digest: str
    identity: dict[str, Any]
    state: State
    result: StageResult | None = None
    holder: str | None = None  # The live process that is at it.
    problem: str | None = None  # What of a finished result is gone.

    @property
    def place(self) -> str:
        return store.join(runs(), self.stage, self.digest)


def plan(stage: str, recipe: Any) -> Plan:
    """Resolves the recipe's inputs as the stage itself does; raises what the stage would raise about them."""
    token = PLAN_ONLY.set(True)
    try:
        stage_run(stage)(recipe)
    except Planned as named:
        digest, identity, missing = named.digest, named.identity, named.missing
    else:
        raise AssertionError(f"stage {stage} did not go through run_stage")
    finally:
        PLAN_ONLY.reset(token)
    result = find_result(stage, digest)
    problem = missing(result) if result is not None else None
    if result is not None and problem is None:
        return Plan(stage, digest, identity, "finished", result)
    holder = holder_of(stage, digest)
    if holder is not None:
        return Plan(stage, digest, identity, "running", holder=holder)
    if problem is not None:
        return Plan(stage, digest, identity, "lost", problem=problem)
    started = store.exists(store.join(runs(), stage, digest, "lease.json"))
    return Plan(stage, digest, identity, "unfinished" if started else "missing")
