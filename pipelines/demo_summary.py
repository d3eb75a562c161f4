"""What came of `vit demo`: its table, accuracies with their intervals, floors, the gate's answer, the exit code."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from pipelines.progress import console, say
from pipelines.workflow.report import duration, how_it_came
from pipelines.workflow.runner import Outcome

__all__ = ["FLOORS", "Measured", "Summary", "difference", "keep", "say_reached", "say_summary"]

# Held-out top-1 by step; below it the demo fails: something is broken. What it reaches stands in docs/performance.md.
FLOORS = {"pretrain": 0.80, "evaluate": 0.90}
OK, FAILED, REFUSED = 0, 1, 3  # REFUSED as `vit promote` has it.


@dataclass(frozen=True, slots=True)
class Measured:
    """Held-out top-1 with its 95 % interval (Wilson)."""

    top1: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.top1:.3f}  [{self.low:.3f}, {self.high:.3f}]"


def difference(one: Measured, other: Measured) -> tuple[float, float, float]:
    """one - other with its 95 % interval from the two intervals (Newcombe 1998, method 10)."""
    gain = one.top1 - other.top1
    low = gain - math.hypot(one.top1 - one.low, other.high - other.top1)
    high = gain + math.hypot(one.high - one.top1, other.top1 - other.low)
    return gain, low, high


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The steps that are done, those that are not and why, and what the images were."""

    outcomes: Mapping[str, Outcome]
    not_run: Mapping[str, str] = field(default_factory=dict)  # Step -> why.
    upstream: str = "Fashion-MNIST"
    downstream: str = "digits"
    own_images: bool = False  # How hard they are nobody knows: no floor.
    stand_in: bool = False  # Other photos in the place of Fashion-MNIST: no floor either.
    seconds: float = 0.0

    def measured(self, step: str) -> Measured | None:
        if step not in self.outcomes:
            return None
        metrics = self.outcomes[step].result.metrics
        return Measured(metrics["test/top1"], metrics["test/top1_low"], metrics["test/top1_high"])

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Of the table: step, how it came, images/s, seconds, output."""
        done = [
            (
                name,
                how_it_came(outcome),
                f"{rate:,.0f}" if (rate := images_per_second(outcome)) else "",
                f"{outcome.seconds:.1f}",
                _short(outcome),
            )
            for name, outcome in self.outcomes.items()
        ]
        return done + [(name, "not run", "", "", why) for name, why in self.not_run.items()]

    def accuracies(self) -> list[str]:
        """A line for each accuracy that there is, and what pretraining gave."""
        named = {
            "pretrain": f"{self.upstream}, pretrained",
            "evaluate": f"{self.downstream}, fine-tuned from it",
            "evaluate_scratch": f"{self.downstream}, the same from scratch",
        }
        found = {name: measured for name in named if (measured := self.measured(name))}
        lines = [f"  {named[name]:<34}{measured}" for name, measured in found.items()]
        if "evaluate" in found and "evaluate_scratch" in found:
            gain, low, high = difference(found["evaluate"], found["evaluate_scratch"])
            lines.append(f"  {'what pretraining gave':<34}{gain:+.3f}  [{low:+.3f}, {high:+.3f}]")
        return lines

    def floors(self) -> dict[str, float]:
        left_out = {"evaluate": self.own_images, "pretrain": self.stand_in}
        return {name: floor for name, floor in FLOORS.items() if not left_out[name]}

    def below_floor(self) -> list[str]:
        return [
            f"{name}: held-out top-1 {measured.top1:.4f} is below {floor:.2f}"
            for name, floor in self.floors().items()
            if (measured := self.measured(name)) and measured.top1 < floor
        ]

    def promotion(self) -> tuple[bool, str] | None:
        """Whether the new version is champion now, and why; which one stays if it is not."""
        if "promote" not in self.outcomes:
            return None
        details = self.outcomes["promote"].result.details
        passed, reason, champion = bool(details["passed"]), str(details["reason"]), details["champion"]
        return passed, reason if passed or champion is None else f"{reason}; {champion} stays champion"

    @property
    def exit_code(self) -> int:
        """0; 1 below a floor; 3 when the gate refused the new version and there is no champion to predict with."""
        if self.below_floor():
            return FAILED
        return REFUSED if self.not_run else OK


def say_reached(summary: Summary) -> None:
    """The table and the accuracies, of as many steps as are done."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("step", "", "images/s", "seconds", "output"):
        table.add_column(column, justify="right" if column in {"images/s", "seconds"} else "left", overflow="fold")
    for row in summary.rows():
        table.add_row(*row)
    say("")
    terminal = console()
    (terminal if terminal.is_terminal else Console(file=terminal.file, width=140)).print(table)
    if lines := summary.accuracies():
        say("\nheld-out top-1, with its 95 % interval")
        for line in lines:
            say(line)


def say_summary(summary: Summary) -> None:
    """How the demo ends."""
    say_reached(summary)
    for line in ending(summary):
        say(line)


def ending(summary: Summary) -> Iterator[str]:
    """What follows the figures: the time, the gate's answer, where to look, what to try, what went wrong."""
    outcomes = summary.outcomes
    reused = sum(outcome.result.reused for outcome in outcomes.values())
    yield (
        f"\nwall time {duration(summary.seconds)}; {len(outcomes) - reused} steps ran, "
        f"{reused} were finished before and reused"
    )
    promotion = summary.promotion()
    if promotion is not None:
        passed, reason = promotion
        yield f"{'promoted' if passed else 'REFUSED':<10}{reason}"
    for name, why in summary.not_run.items():
        yield f"{'not run':<10}{name}: {why}"
    model = model_name(outcomes["finetune"]) if "finetune" in outcomes else "(not registered)"
    yield f"MLflow    {os.environ.get('MLFLOW_TRACKING_URI', 'MLFLOW_TRACKING_URI is not set')}  (model {model})"
    yield "next"
    yield "  vit why demo                            what is finished, and what would run after a change"
    yield "  vit demo --corpus DIR                   the same with your own class folders"
    if not summary.not_run:
        yield f"  vit predict demo/predict --model models:/{model}@champion --images DIR"
    elif "finetune" in outcomes:
        version = outcomes["finetune"].result.uri
        yield f"  vit predict demo/predict --model {version} --images DIR   a version needs no promotion to predict"
    for line in summary.below_floor():
        yield f"FAILED  {line}"


def keep(summary: Summary) -> None:
    """The same figures for programs: demo.json in the state folder; benchmarks/demo.py reads it."""
    from pipelines.workflow.home import state_folder

    (state_folder() / "demo.json").write_text(json.dumps(figures(summary), indent=1))


def figures(summary: Summary) -> dict[str, object]:
    """Claims by name, and per step its digest, whether it was reused, and its seconds."""
    claims: dict[str, float] = {}
    for name, step in {"upstream_top1": "pretrain", "downstream_top1": "evaluate"}.items():
        if measured := summary.measured(step):
            claims[name] = measured.top1
    if (tuned := summary.measured("evaluate")) and (twin := summary.measured("evaluate_scratch")):
        claims["gain_over_scratch"] = tuned.top1 - twin.top1
    if "pretrain" in summary.outcomes:
        claims["pretrain_images_per_second"] = images_per_second(summary.outcomes["pretrain"]) or 0.0
    steps = {
        name: {"digest": outcome.result.digest, "reused": outcome.result.reused, "seconds": round(outcome.seconds, 2)}
        for name, outcome in summary.outcomes.items()
    }
    return {
        "seconds": round(summary.seconds, 2),
        "exit_code": summary.exit_code,
        "claims": claims,
        "steps": steps,
        "not_run": dict(summary.not_run),
    }


def images_per_second(outcome: Outcome) -> float | None:
    """As the stage measured it, else over the whole step; a reused step keeps only the former."""
    result = outcome.result
    measured = result.metrics.get("images_per_second")
    images = result.metrics.get("test/num_images") or result.details.get("num_images")
    if measured is None and images and not result.reused:
        return float(images) / outcome.seconds
    return measured


def model_name(outcome: Outcome) -> str:
    found = re.fullmatch(r"models:/([^/@]+)[/@].*", outcome.result.uri)
    return found[1] if found else "(not registered)"


def _short(outcome: Outcome) -> str:
    return re.sub(r"[0-9a-f]{64}", lambda found: found[0][:12], outcome.result.uri)
