"""What the command line prints of finished work: a line per step, a few aligned lines per result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipelines.progress import say

if TYPE_CHECKING:
    from pipelines.workflow.runner import Outcome

__all__ = ["duration", "how_it_came", "say_result", "say_step", "shown_metrics"]


def how_it_came(outcome: Outcome) -> str:
    return "reused" if outcome.result.reused else "ran"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def say_step(outcome: Outcome) -> None:
    """One line when a step of a workflow is done; of a refusal that was decided before also the reason."""
    result = outcome.result
    say(f"{outcome.step:<18} {how_it_came(outcome):<7} {result.digest[:12]}  {duration(outcome.seconds):>9}")
    if result.reused and result.details.get("passed") is False:
        say(f"  {result.details['reason']}")


def say_result(outcome: Outcome) -> None:
    """The result of one stage, after `vit VERB RECIPE`."""
    result = outcome.result
    lines: dict[str, Any] = {
        outcome.stage: f"{how_it_came(outcome)}, {duration(outcome.seconds)}",
        "digest": result.digest[:12],
        "output": result.uri,
    }
    if result.run_id:
        lines["run"] = result.run_id
    lines |= shown_metrics(result.metrics)
    width = max(map(len, lines))
    for name, value in lines.items():
        say(f"{name:<{width}}  {value}")


def shown_metrics(metrics: Mapping[str, float], limit: int = 12) -> dict[str, str]:
    return {name: f"{value:.6g}" for name, value in list(metrics.items())[:limit]}
